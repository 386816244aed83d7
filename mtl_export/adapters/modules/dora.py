"""DoRA's forward pass, written from the paper: parity's oracle.

    h = m . (W x + s B A x) / ||W + s B A|| + b

Symbols and source: ``mtl_export.adapters.dora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer
from mtl_export.adapters.modules.lora import values_and_scaling
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class DoRALinear(AdaptedLayer):
    """A frozen linear layer with a DoRA adapter.

    Args:
        base: The layer to adapt.
        values: ``down`` ``[r, I]``, ``up`` ``[O, r]`` and ``magnitude`` ``[O]``.
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

    @classmethod
    def from_tensors(
        cls, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> nn.Module:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        values, scaling = values_and_scaling(layer)
        if isinstance(base, nn.Embedding):
            return DoRAEmbedding(base, values=values, scaling=scaling)
        return cls(base, values=values, scaling=scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        down, up = self.get_buffer("down"), self.get_buffer("up")
        weight, bias = self.base.weight, self.base.bias
        lengths = (weight + self.scaling * up @ down).norm(dim=1)
        z = functional.linear(x, weight) + self.scaling * functional.linear(
            functional.linear(x, down), up
        )
        h: torch.Tensor = self.get_buffer("magnitude") * z / lengths
        return h if bias is None else h + bias


class DoRAEmbedding(AdaptedLayer):
    """A frozen embedding with a DoRA adapter; one length per embedding dimension.

    Args:
        base: The embedding to adapt, of V entries.
        values: ``down`` ``[r, V]``, ``up`` ``[O, r]`` and ``magnitude`` ``[O]``.
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
        down, up = self.get_buffer("down"), self.get_buffer("up")
        lengths = (self.base.weight.T + self.scaling * up @ down).norm(dim=1)
        z = self.base(ids) + self.scaling * functional.linear(down.T[ids], up)
        h: torch.Tensor = self.get_buffer("magnitude") * z / lengths
        return h
