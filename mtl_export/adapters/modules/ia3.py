"""(IA)^3's forward pass, written from the paper: parity's oracle.

    h = s l . (W x + b)

Symbols and source: ``mtl_export.adapters.ia3``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch
from torch import nn

from mtl_export.adapters.modules.adapted import AdaptedLayer
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class IA3Linear(AdaptedLayer):
    """A frozen linear layer whose outputs are rescaled.

    Args:
        base: The layer to adapt.
        scale: l ``[O]``.
        scaling: s.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def __init__(self, base: nn.Linear, *, scale: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.register_buffer("scale", scale.to(base.weight.dtype))

    @classmethod
    def from_tensors(cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> IA3Linear:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        scale = torch.from_numpy(layer.tensors["scale"].widened())
        return cls(base, scale=scale, scaling=layer.hyper.get("scaling", 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        h: torch.Tensor = self.base(x) * (self.scaling * self.get_buffer("scale"))
        return h
