"""KaSA's forward pass, written from the paper: parity's oracle.

    h = W' x + b + s B diag(d) A x        W' = W without its r least singular directions

Symbols and source: ``mtl_export.adapters.kasa``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.adapters.modules.lora import LoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class KaSALinear(LoRALinear):
    """A linear layer of truncated rank, with a LoRA adapter that has a trained diagonal."""

    embedding: ClassVar[type[FrozenAdapter] | None] = None

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        kept = min(base.weight.shape) - self.get_buffer("down").shape[0]
        with torch.no_grad():
            left, singular, right = torch.linalg.svd(base.weight.double(), full_matrices=False)
            base.weight.copy_(left[:, :kept] @ singular[:kept].diag() @ right[:kept])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        z = functional.linear(x, self.get_buffer("down")) * self.get_buffer("diagonal")
        h: torch.Tensor = self.base(x) + self.scaling * functional.linear(z, self.get_buffer("up"))
        return h
