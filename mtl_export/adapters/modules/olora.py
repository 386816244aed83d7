"""OLoRA's forward pass, written from the paper: parity's oracle.

    h = (W - s Q_r R_r) x + b + s B A x

Symbols and source: ``mtl_export.adapters.olora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import torch
from torch import nn

from mtl_export.adapters.modules.lora import LoRALinear, values_and_scaling
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class OLoRALinear(LoRALinear):
    """A linear layer without the start of its QR decomposition, with a LoRA adapter."""

    @classmethod
    def from_tensors(
        cls, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> nn.Module:
        """Return the layer with a checkpoint's values; the base layer is changed."""
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{layer.module}: OLoRA adapts linear layers")
        values, scaling = values_and_scaling(layer)
        rank = values["down"].shape[0]
        with torch.no_grad():
            q, r = torch.linalg.qr(base.weight.double())
            base.weight.copy_(base.weight.double() - scaling * q[:, :rank] @ r[:rank])
        return cls(base, values=values, scaling=scaling)
