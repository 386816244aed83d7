"""OLoRA's forward pass, written from the paper: parity's oracle.

    h = (W - s Q_r R_r) x + b + s B A x

Symbols and source: ``mtl_export.adapters.olora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch

from mtl_export.adapters.modules.lora import ChangedBaseLinear


class OLoRALinear(ChangedBaseLinear):
    """A linear layer without the start of its QR decomposition, with a LoRA adapter."""

    def changed(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """Return W'."""
        q, r = torch.linalg.qr(weight)
        changed: torch.Tensor = weight - self.scaling * q[:, :rank] @ r[:rank]
        return changed
