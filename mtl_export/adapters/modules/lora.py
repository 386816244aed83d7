"""LoRA's forward pass, written from the paper: parity's oracle.

    h = W x + b + s (B A x + b_B)

Symbols and source: ``mtl_export.adapters.lora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class LoRALinear(AdaptedLayer):
    """A frozen linear layer with a LoRA adapter.

    Args:
        base: The layer to adapt.
        values: ``down`` ``[r, I]``, ``up`` ``[O, r]`` and maybe ``up_bias`` ``[O]``, with or
            without ``bias`` ``[O]`` in place of the base's.
        scaling: s.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def __init__(
        self, base: nn.Linear, *, values: Mapping[str, torch.Tensor], scaling: float
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        for role, value in values.items():
            self.register_buffer(role, value.to(base.weight.dtype))
        self.up_bias = dict(self.named_buffers()).get("up_bias")
        if "bias" in values:
            with torch.no_grad():
                base.bias.copy_(values["bias"])

    @classmethod
    def from_tensors(
        cls, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> nn.Module:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        values, scaling = values_and_scaling(layer)
        if isinstance(base, nn.Embedding):
            return LoRAEmbedding(base, values=values, scaling=scaling)
        return cls(base, values=values, scaling=scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        z = functional.linear(x, self.get_buffer("down"))  # A x
        delta = functional.linear(z, self.get_buffer("up"), self.up_bias)  # B A x + b_B
        h: torch.Tensor = self.base(x) + self.scaling * delta
        return h


class LoRAEmbedding(AdaptedLayer):
    """A frozen embedding with a LoRA adapter: h_v = W_v + s B A_v, A_v column v of A.

    Args:
        base: The embedding to adapt, of V entries.
        values: ``down`` ``[r, V]`` and ``up`` ``[O, r]``.
        scaling: s.

    Shape:
        ids int64 ``[...]``; result ``[..., O]``.
    """

    def __init__(
        self, base: nn.Embedding, *, values: Mapping[str, torch.Tensor], scaling: float
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        for role, value in values.items():
            self.register_buffer(role, value.to(base.weight.dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of ``ids``."""
        z = self.get_buffer("down").T[ids]
        h: torch.Tensor = self.base(ids) + self.scaling * functional.linear(
            z, self.get_buffer("up")
        )
        return h


def tensors_of(layer: LayerTensors) -> dict[str, torch.Tensor]:
    """Return a layer's stored values by role, float32 or float64."""
    return {role: torch.from_numpy(tensor.widened()) for role, tensor in layer.tensors.items()}


def values_and_scaling(layer: LayerTensors) -> tuple[dict[str, torch.Tensor], float]:
    """Return a LoRA layer's values by role, and s = alpha / r unless the producer gave s."""
    values = tensors_of(layer)
    scaling = layer.hyper.get("scaling")
    if scaling is None:
        scaling = layer.hyper["alpha"] / values["down"].shape[0]
    if not math.isfinite(scaling):
        raise ValueError(f"{layer.module}: the scaling {scaling} is not finite")
    return values, scaling
