"""KaSA's forward pass, written from the paper: parity's oracle.

    h = W' x + b + s B diag(d) A x        W' = W without its r least singular directions

Symbols and source: ``mtl_export.adapters.kasa``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mtl_export.adapters.modules.lora import ChangedBaseLinear


class KaSALinear(ChangedBaseLinear):
    """A linear layer of truncated rank, with a LoRA adapter that has a trained diagonal."""

    def changed(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """Return W'."""
        kept = min(weight.shape) - rank
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        changed: torch.Tensor = left[:, :kept] @ singular[:kept].diag() @ right[:kept]
        return changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        z = functional.linear(x, self.down) * self.get_buffer("diagonal")
        h: torch.Tensor = self.base(x) + self.scaling * functional.linear(z, self.up)
        return h
