"""PiSSA's forward pass, written from the paper: parity's oracle.

    h = (W - U_r S_r V_r^T) x + b + s B A x

Symbols and source: ``mtl_export.adapters.pissa``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch
from torch import nn

from mtl_export.adapters.modules.lora import LoRALinear, values_and_scaling
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class PiSSALinear(LoRALinear):
    """A linear layer without its principal part, with a LoRA adapter in its place."""

    @classmethod
    def from_tensors(
        cls, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> nn.Module:
        """Return the layer with a checkpoint's values; the base layer is changed."""
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{layer.module}: PiSSA adapts linear layers")
        values, scaling = values_and_scaling(layer)
        rank = values["down"].shape[0]
        with torch.no_grad():
            left, singular, right = torch.linalg.svd(base.weight.double(), full_matrices=False)
            principal = left[:, :rank] @ singular[:rank].diag() @ right[:rank]
            base.weight.copy_(base.weight.double() - principal)
        return cls(base, values=values, scaling=scaling)
