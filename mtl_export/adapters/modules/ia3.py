"""(IA)^3's forward pass, written from the paper: parity's oracle.

    h = s l . (W x + b)

Symbols and source: ``mtl_export.adapters.ia3``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors


class IA3Linear(FrozenAdapter):
    """A frozen linear layer whose outputs are rescaled by ``scale`` ``[O]``, which is l.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def scaling_of(self, layer: LayerTensors) -> float:
        """Return s, 1 where the producer gave none."""
        return layer.hyper.get("scaling", 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        h: torch.Tensor = self.base(x) * (self.scaling * self.get_buffer("scale"))
        return h
