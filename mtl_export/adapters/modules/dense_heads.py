"""The four heads of dense tasks that MTLoRA can be trained with, from their formulas.

Each takes four maps ``[B, c_i, h_i, h_i]``, the finest first, and returns ``[B, n, H, H]`` raw
values, which the model resizes to the image. Names are the checkpoint's, so that its tensors load
strictly. Where a checkpoint has no statistics of a batch normalisation, it is folded already and
does nothing here.

    hrnet      concat -> 1x1 conv, BN, ReLU, 1x1 conv         (Sun et al., arXiv:1904.04514)
    aspp       concat -> five branches, BN, ReLU, 1x1, 3x3    (Chen et al., arXiv:1706.05587)
    segformer  a linear layer per map -> concat -> 1x1 conv   (Xie et al., arXiv:2105.15203)
    updecoder  concat -> three stride-2 deconvolutions -> 3x3 conv -> twice enlarged

Sizes and names as in https://github.com/scale-lab/MTLoRA/tree/333a375, models/mtl.py; every
resize is bilinear between centres of pixels (``align_corners=False``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

Shapes = Mapping[str, Sequence[int]]
Maps = Sequence[torch.Tensor]
ASPP_DILATIONS = (12, 24, 36)


def resized(values: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``[B, C, size, size]``, bilinear between centres of pixels."""
    if values.shape[-1] == size:
        return values
    return functional.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)


def at_finest(maps: Maps) -> list[torch.Tensor]:
    """Return all maps at the size of the first."""
    return [resized(one, maps[0].shape[-1]) for one in maps]


def conv(shapes: Shapes, name: str, dilation: int = 1) -> nn.Conv2d:
    """Return the convolution of that name, of stride 1 and the same size out as in."""
    outputs, inputs, kernel, _ = shapes[f"{name}.weight"]
    has_bias = f"{name}.bias" in shapes
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=has_bias)


def batch_norm(shapes: Shapes, name: str) -> nn.Module:
    """Return the batch normalisation of that name, or nothing where it is folded."""
    weight = shapes.get(f"{name}.weight")
    return nn.Identity() if weight is None else nn.BatchNorm2d(weight[0])


class HRNetHead(nn.Module):
    """Two 1x1 convolutions on all maps."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.last_layer = nn.Sequential(
            conv(shapes, f"{name}.last_layer.0"),
            batch_norm(shapes, f"{name}.last_layer.1"),
            nn.ReLU(),
            conv(shapes, f"{name}.last_layer.3"),
        )

    def forward(self, maps: Maps) -> torch.Tensor:
        """Return raw values at the finest map's size."""
        result: torch.Tensor = self.last_layer(torch.cat(at_finest(maps), 1))
        return result


class _ASPP(nn.Module):
    """Dilated convolutions beside each other, and the mean of the whole map."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()

        def branch(where: str, dilation: int = 1) -> list[nn.Module]:
            parent, _, place = where.rpartition(".")
            norm = batch_norm(shapes, f"{parent}.{int(place) + 1}")
            return [conv(shapes, where, dilation), norm, nn.ReLU()]

        dilations = (1, *ASPP_DILATIONS)
        branches = [branch(f"{name}.convs.{i}.0", by) for i, by in enumerate(dilations)]
        pooled = [nn.AdaptiveAvgPool2d(1), *branch(f"{name}.convs.{len(dilations)}.1")]
        self.convs = nn.ModuleList(nn.Sequential(*layers) for layers in [*branches, pooled])
        self.project = nn.Sequential(*branch(f"{name}.project.0"), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, c, h, h]``."""
        found = [resized(one(x), x.shape[-1]) for one in self.convs]
        result: torch.Tensor = self.project(torch.cat(found, 1))
        return result


class ASPPHead(nn.Sequential):
    """DeepLabV3's head on all maps."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__(
            _ASPP(shapes, f"{name}.0"),
            conv(shapes, f"{name}.1"),
            batch_norm(shapes, f"{name}.2"),
            nn.ReLU(),
            conv(shapes, f"{name}.4"),
        )

    def forward(self, maps: Maps) -> torch.Tensor:
        """Return raw values at the finest map's size."""
        x = torch.cat(at_finest(maps), 1)
        for layer in self:
            x = layer(x)
        return x


class _Projection(nn.Module):
    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        outputs, inputs = shapes[f"{name}.proj.weight"]
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, c, h, h]``: the layer on every pixel."""
        result: torch.Tensor = self.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return result.reshape(-1, self.proj.out_features, *x.shape[2:])


class _Fusion(nn.Module):
    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.conv = conv(shapes, f"{name}.conv")
        self.bn = batch_norm(shapes, f"{name}.bn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the fused map."""
        result: torch.Tensor = self.bn(self.conv(x))
        return functional.relu(result)


class SegFormerHead(nn.Module):
    """One linear layer per map; maps are joined from the coarsest to the finest."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for place in range(1, 5):
            self.add_module(f"linear_c{place}", _Projection(shapes, f"{name}.linear_c{place}"))
        self.linear_fuse = _Fusion(shapes, f"{name}.linear_fuse")
        self.linear_pred = conv(shapes, f"{name}.linear_pred")
        if f"{name}.conv_seg.weight" in shapes:  # stored by its library, and never used
            self.conv_seg = conv(shapes, f"{name}.conv_seg")

    def forward(self, maps: Maps) -> torch.Tensor:
        """Return raw values at the finest map's size."""
        found = [self.get_submodule(f"linear_c{i}")(one) for i, one in enumerate(maps, start=1)]
        fused = self.linear_fuse(torch.cat(at_finest(found)[::-1], 1))
        result: torch.Tensor = self.linear_pred(fused)
        return result


class UpDecoderHead(nn.Module):
    """Deconvolutions to eight times the size; the last layer ends in a ReLU."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place in (0, 3, 6):
            inputs, outputs, _, _ = shapes[f"{name}.deconv_layers.{place}.weight"]
            has_bias = f"{name}.deconv_layers.{place}.bias" in shapes
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=has_bias),
                batch_norm(shapes, f"{name}.deconv_layers.{place + 1}"),
                nn.ReLU(),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        self.conv_layers = nn.Sequential(
            conv(shapes, f"{name}.conv_layers.0"),
            batch_norm(shapes, f"{name}.conv_layers.1"),
            nn.ReLU(),
        )

    def forward(self, maps: Maps) -> torch.Tensor:
        """Return values of at least zero at 32 times the finest map's size."""
        x: torch.Tensor = self.conv_layers(self.deconv_layers(torch.cat(at_finest(maps), 1)))
        for _ in range(2):
            x = resized(x, 2 * x.shape[-1])
        return x


Head = Callable[[Shapes, str], nn.Module]
# Kind -> the tensor that only it has, and its class.
HEADS: dict[str, tuple[str, Head]] = {
    "hrnet": ("last_layer.0.weight", HRNetHead),
    "aspp": ("0.convs.0.0.weight", ASPPHead),
    "segformer": ("linear_fuse.conv.weight", SegFormerHead),
    "updecoder": ("deconv_layers.0.weight", UpDecoderHead),
}


def head_kind(shapes: Shapes, name: str) -> str:
    """Return the kind of the head whose tensors start with ``name``; empty if it is none."""
    found = (kind for kind, (tensor, _) in HEADS.items() if f"{name}.{tensor}" in shapes)
    return next(found, "")


def head(shapes: Shapes, name: str) -> nn.Module:
    """Return the head whose tensors start with ``name``.

    Raises:
        KeyError: It is none of ``HEADS``; readers refuse that first.
    """
    return HEADS[head_kind(shapes, name)][1](shapes, name)


class Downsampler(nn.Module):
    """One task's 1x1 convolutions from a stage's tokens to the maps of its head."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        for stage in range(4):
            shape = shapes.get(f"{name}.downsample_{stage}.weight")
            if shape is not None:
                layer = nn.Conv2d(shape[1], shape[0], 1, bias=False)
                self.add_module(f"downsample_{stage}", layer)

    def forward(self, stage: int, tokens: torch.Tensor) -> torch.Tensor:
        """Return ``[B, c, h, h]`` for tokens ``[B, h * h, C]``."""
        layer = getattr(self, f"downsample_{stage}", None)
        if layer is not None:
            tokens = functional.linear(tokens, layer.weight[:, :, 0, 0])
        side = int(tokens.shape[1] ** 0.5 + 0.5)
        return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], side, side)


class Decoders(nn.Module):
    """The heads, by task; named so by the checkpoint."""

    def __init__(self, shapes: Shapes, tasks: Sequence[str]) -> None:
        super().__init__()
        name = "decoders.decoders"
        self.decoders = nn.ModuleDict({task: head(shapes, f"{name}.{task}") for task in tasks})
