"""AdapterHub's DoRA forward pass, written from its equation: parity's oracle.

    h = m / ||W + B A|| . (W x + b + s B A x)

Symbols and source: ``mtl_export.adapters.adapterhub_dora``, whose normal form is NOT used
here; a test holds the two against each other in float64.
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


class AdapterHubDoRALinear(AdaptedLayer):
    """A frozen linear layer with a DoRA adapter of AdapterHub's kind.

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
        cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors
    ) -> AdapterHubDoRALinear:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        values, scaling = values_and_scaling(layer)
        return cls(base, values=values, scaling=scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        down, up = self.get_buffer("down"), self.get_buffer("up")
        lengths = (self.base.weight + up @ down).norm(dim=1)
        added = functional.linear(functional.linear(x, down), up) * self.scaling
        h: torch.Tensor = self.get_buffer("magnitude") / lengths * (self.base(x) + added)
        return h
