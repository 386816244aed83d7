"""OLoRA's forward pass, written from the paper: parity's oracle.

    h = (W - s Q_r R_r) x + b + s B A x

Symbols and source: ``mtl_export.adapters.olora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.adapters.modules.lora import LoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class OLoRALinear(LoRALinear):
    """A linear layer without the start of its QR decomposition, with a LoRA adapter."""

    embedding: ClassVar[type[FrozenAdapter] | None] = None

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        rank = self.get_buffer("down").shape[0]
        with torch.no_grad():
            q, r = torch.linalg.qr(base.weight.double())
            base.weight.copy_(base.weight.double() - self.scaling * q[:, :rank] @ r[:rank])
