"""PiSSA's forward pass, written from the paper: parity's oracle.

    h = (W - U_r S_r V_r^T) x + b + s B A x

Symbols and source: ``mtl_export.adapters.pissa``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch

from mtl_export.adapters.modules.lora import ChangedBaseLinear


class PiSSALinear(ChangedBaseLinear):
    """A linear layer without its principal part, with a LoRA adapter in its place."""

    def changed(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """Return W'."""
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        changed: torch.Tensor = weight - left[:, :rank] @ singular[:rank].diag() @ right[:rank]
        return changed
