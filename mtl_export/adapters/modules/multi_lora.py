"""MultiLoRA's forward pass, written from the paper: parity's oracle.

    h = W x + b + s . sum_i diag(c_i) B_i A_i x        s = alpha / r

Symbols and source: ``mtl_export.adapters.multi_lora``, whose normal form is NOT used here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer
from mtl_export.adapters.modules.lora import tensors_of
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class MultiLoRALinear(AdaptedLayer):
    """A frozen linear layer with n parallel LoRAs, each with its output scaling.

    Args:
        base: The layer to adapt.
        layer: With ``down [n, r, I]``, ``up [n, O, r]``, ``scaling_rows [n, O]``, ``alpha``.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def __init__(self, base: nn.Linear, layer: LayerTensors) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        values = {role: v.to(base.weight.dtype) for role, v in tensors_of(layer).items()}
        self.parts = list(zip(values["down"], values["up"], values["scaling_rows"], strict=True))
        self.scaling = layer.hyper["alpha"] / values["down"].shape[1]

    @classmethod
    def from_tensors(
        cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors
    ) -> MultiLoRALinear:
        """Return the layer with a checkpoint's values; it needs no routing."""
        return cls(base, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        h: torch.Tensor = self.base(x)
        for down, up, scaling_row in self.parts:
            part = functional.linear(functional.linear(x, down), up)  # B_i A_i x
            h = h + self.scaling * scaling_row * part
        return h
