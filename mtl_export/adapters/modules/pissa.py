"""PiSSA's forward pass, written from the paper: parity's oracle.

    h = (W - U_r S_r V_r^T) x + b + s B A x

Symbols and source: ``mtl_export.adapters.pissa``, whose normal form is NOT used here; a
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


class PiSSALinear(LoRALinear):
    """A linear layer without its principal part, with a LoRA adapter in its place."""

    embedding: ClassVar[type[FrozenAdapter] | None] = None

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        rank = self.get_buffer("down").shape[0]
        with torch.no_grad():
            left, singular, right = torch.linalg.svd(base.weight.double(), full_matrices=False)
            principal = left[:, :rank] @ singular[:rank].diag() @ right[:rank]
            base.weight.copy_(base.weight.double() - principal)
