"""MTLoRA's forward pass on Swin, written from its formulas: for training, and as parity's oracle.

A stage passes one shared stream on. In its last block every task grows a thin stream beside it,
through the layers of ``mtlora_layers``; patch merging, 1x1 convolutions and a head per task
read it.

Modules carry the names of the checkpoint, and layers are chosen by the tensors that are there: a
task term exists if its tensors do. Tensors that ``mtl_export.dense.fold`` has folded
load into the same model.

Source: as in ``mtlora_layers``, and models/swin_transformer_mtlora.py, models/swin_mtl.py there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.dense_heads import Decoders, Downsampler, Shapes, resized
from mtl_export.adapters.modules.mtlora_layers import StreamLinear, Streams, SwinModel, linear
from mtl_export.adapters.modules.swin_windows import WindowAttention, attention_mask

# From how many tokens on a folded model computes the tasks' hidden values in parts.
LONG = 2048


@dataclass(frozen=True)
class StageFeatures:
    """What a stage gives: shared tokens ``[B, L, C]``, and those of each task.

    A folded model leaves the width of ``tasks`` at that of patch merging's norm: the downsamplers,
    the only ones to read them, hold the product of the two matrices. Tasks without a stream of
    their own have the shared tokens.
    """

    shared: torch.Tensor
    tasks: tuple[torch.Tensor, ...]


class Mlp(nn.Module):
    """fc1, GELU (exact), fc2, on both streams.

    Of a folded model with many tokens the tasks' hidden values, the widest of all, are computed
    for some of the tokens at a time: none of them is larger than the shared stream's.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: torch.Tensor, z: Streams) -> tuple[torch.Tensor, Streams]:
        """Return the shared output and the tasks'."""
        first, second = self.fc1, self.fc2
        is_long = x.shape[1] >= LONG
        if is_long and isinstance(first, StreamLinear) and isinstance(second, StreamLinear):
            return _in_parts(first, second, x, x.unsqueeze(0) if z is None else z)
        hidden, hidden_tasks = first(x, z)
        if hidden_tasks is not None:
            hidden_tasks = functional.gelu(hidden_tasks)
        result: tuple[torch.Tensor, Streams] = second(functional.gelu(hidden), hidden_tasks)
        return result


def _in_parts(
    first: StreamLinear, second: StreamLinear, x: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, Streams]:
    """Return what ``Mlp`` does, the tasks' hidden values for a share of the tokens at a time."""
    frozen = first.frozen(x)
    step = -(-x.shape[1] // len(first.task_down))
    lows, totals = [], []
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        hidden = first.tasks(frozen[:, part], z[:, :, part])
        if first.lora_norm is not None:
            totals.append(hidden.sum(0))
        lows.append(functional.gelu(hidden) @ second.task_down)
    total = torch.cat(totals, 1) if totals else frozen
    shared = functional.gelu(first.shared(x, frozen, total))
    frozen = second.frozen(shared)
    tasks = frozen + torch.cat(lows, 2) @ second.task_up
    return second.shared(shared, frozen, tasks.sum(0) if second.lora_norm else frozen), tasks


class Block(nn.Module):
    """Attention and MLP; task streams leave the output projection, or fc2, of the last block."""

    attn_mask: torch.Tensor | None

    def __init__(
        self, shapes: Shapes, name: str, stage: int, resolution: int, model: SwinModel
    ) -> None:
        super().__init__()
        rows, heads = shapes[f"{name}.attn.relative_position_bias_table"]
        window = (int(rows**0.5 + 0.5) + 1) // 2
        is_odd = int(name.rpartition(".")[2]) % 2 == 1
        self.resolution = resolution
        self.shift = window // 2 if is_odd and resolution > window else 0
        width = shapes[f"{name}.norm1.weight"][0]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        qkv, proj, fc1, fc2 = (
            linear(shapes, f"{name}.{layer}", stage, model)
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        self.attn = WindowAttention(qkv, proj, heads=heads, window=window, scale=model.qk_scale)
        self.mlp = Mlp(fc1, fc2)
        mask = attention_mask(resolution, window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Streams]:
        """Return the shared stream ``[B, L, C]`` and the tasks'."""
        mixed = self.attn(self.norm1(x), self.resolution, self.shift, self.attn_mask)
        u, u_tasks = self.attn.proj(mixed)
        u = x + u
        if u_tasks is not None:
            u_tasks = x + u_tasks
        n_tasks = None if u_tasks is None else self.norm2(u_tasks)
        v, v_tasks = self.mlp(self.norm2(u), n_tasks)
        if v_tasks is not None and u_tasks is not None:  # without streams before: no residual
            v_tasks = u_tasks + v_tasks
        return u + v, v_tasks


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, shapes: Shapes, name: str, stage: int, model: SwinModel) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shapes[f"{name}.norm.weight"][0])
        self.reduction = linear(shapes, f"{name}.reduction", stage, model)

    def joined(self, tokens: torch.Tensor, resolution: int) -> torch.Tensor:
        """Return ``[B, L / 4, 4 C]``; neighbours in the order of columns, rows inside."""
        channels, half = tokens.shape[-1], resolution // 2
        grid = tokens.reshape(-1, half, 2, half, 2, channels).permute(0, 1, 3, 4, 2, 5)
        result: torch.Tensor = self.norm(grid.reshape(-1, half * half, 4 * channels))
        return result

    def forward(self, tokens: torch.Tensor, resolution: int) -> torch.Tensor:
        """Return ``[B, L / 4, 2 C]``."""
        result: torch.Tensor = self.reduction(self.joined(tokens, resolution))[0]
        return result


class Stage(nn.Module):
    """Blocks, then patch merging where there is a next stage."""

    def __init__(self, shapes: Shapes, stage: int, resolution: int, model: SwinModel) -> None:
        super().__init__()
        name = f"backbone.layers.{stage}"
        self.resolution = resolution
        depth = next(i for i in range(1000) if f"{name}.blocks.{i}.norm1.weight" not in shapes)
        self.blocks = nn.ModuleList(
            Block(shapes, f"{name}.blocks.{place}", stage, resolution, model)
            for place in range(depth)
        )
        has_merging = any(key.startswith(f"{name}.downsample.") for key in shapes)
        self.downsample = (
            PatchMerging(shapes, f"{name}.downsample", stage, model) if has_merging else None
        )
        down = shapes.get(f"downsampler.{model.tasks[0]}.downsample_{stage}.weight")
        norm = shapes.get(f"{name}.downsample.norm.weight")
        self.is_reduced_by_head = down is not None and norm is not None and down[1] == norm[0]
        streams = model.streams or model.tasks
        self.chosen = [streams.index(task) for task in model.tasks]

    def forward(self, x: torch.Tensor) -> StageFeatures:
        """Return the features after patch merging."""
        streams: Streams = None
        for block in self.blocks:
            x, streams = block(x)
        tasks = [] if streams is None else [streams[place] for place in self.chosen]
        if self.downsample is not None:
            merge = self.downsample.joined if self.is_reduced_by_head else self.downsample
            tasks = [merge(own, self.resolution) for own in tasks]
            x = self.downsample(x, self.resolution)
        return StageFeatures(x, tuple(tasks) or (x,) * len(self.chosen))


class PatchEmbed(nn.Module):
    """Patches of the image as tokens."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        name = "backbone.patch_embed"
        outputs, inputs, patch, _ = shapes[f"{name}.proj.weight"]
        self.proj = nn.Conv2d(inputs, outputs, patch, stride=patch)
        has_norm = f"{name}.norm.weight" in shapes
        self.norm = nn.LayerNorm(outputs) if has_norm else nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return ``[B, L, C]``."""
        result: torch.Tensor = self.norm(self.proj(image).flatten(2).transpose(1, 2))
        return result


class Backbone(nn.Module):
    """Swin with task streams."""

    def __init__(self, shapes: Shapes, model: SwinModel) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shapes)
        position = shapes.get("backbone.absolute_pos_embed")
        self.absolute_pos_embed = None if position is None else nn.Parameter(torch.zeros(*position))
        stages = 1 + max(int(key.split(".")[2]) for key in shapes if ".blocks." in key)
        resolution = model.image_size // shapes["backbone.patch_embed.proj.weight"][2]
        self.layers = nn.ModuleList()
        for stage in range(stages):
            self.layers.append(Stage(shapes, stage, resolution, model))
            resolution //= 2

    def forward(self, image: torch.Tensor) -> list[StageFeatures]:
        """Return what each stage gives."""
        x = self.patch_embed(image)
        if self.absolute_pos_embed is not None:
            x = x + self.absolute_pos_embed
        features: list[StageFeatures] = []
        for stage in self.layers:
            features.append(stage(x))
            x = features[-1].shared
        return features


class MTLoRASwin(nn.Module):
    """The whole model: an image in, one map per task out.

    Args:
        shapes: Shape of each tensor by the checkpoint's name: they choose the layers.
        model: What the tensors do not say.

    Shape:
        image ``[B, 3, H, H]``; result by task ``[B, n_t, H, H]``, raw values.
    """

    def __init__(self, shapes: Shapes, model: SwinModel) -> None:
        super().__init__()
        self.model = model
        self.backbone = Backbone(shapes, model)
        self.downsampler = nn.ModuleDict(
            {task: Downsampler(shapes, f"downsampler.{task}") for task in model.tasks}
        )
        self.decoders = Decoders(shapes, model.tasks)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], model: SwinModel) -> MTLoRASwin:
        """Return the model with these values, in evaluation mode.

        Index tables and masks follow from the image's size and are computed, not loaded.

        Raises:
            RuntimeError: A tensor is missing, or one has no place.
        """
        built = cls({name: tuple(value.shape) for name, value in tensors.items()}, model)
        own = {name: value for name, value in built.named_buffers() if name.endswith(COMPUTED)}
        given = {name: v for name, v in tensors.items() if not name.endswith(COMPUTED)}
        built.load_state_dict({**own, **given})
        return built.eval()

    def maps(self, features: Sequence[StageFeatures]) -> dict[str, list[torch.Tensor]]:
        """Return what each task's head reads: one map per stage, ``[B, c_s, h_s, h_s]``."""
        return {
            task: [
                self.downsampler[task](stage, one.tasks[at]) for stage, one in enumerate(features)
            ]
            for at, task in enumerate(self.model.tasks)
        }

    def answers(self, maps: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the raw values of each task, at the image's size, from its maps."""
        heads, size = self.decoders.decoders, self.model.image_size
        return {task: resized(heads[task](own), size) for task, own in maps.items()}

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the raw values of each task."""
        return self.answers(self.maps(self.backbone(image)))


COMPUTED = ("relative_position_index", "attn_mask")
