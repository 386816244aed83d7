"""MultiLoRA's forward pass, written from the paper: parity's oracle.

    h = W x + b + s . sum_i diag(c_i) B_i A_i x        s = alpha / r

Symbols and source: ``mtl_export.adapters.multi_lora``, whose normal form is NOT used here.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors


class MultiLoRALinear(FrozenAdapter):
    """A frozen linear layer with n parallel LoRAs, each with its output scaling.

    Its values are ``down [n, r, I]``, ``up [n, O, r]`` and ``scaling_rows [n, O]``.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def scaling_of(self, layer: LayerTensors) -> float:
        """Return s = alpha / r."""
        return layer.hyper["alpha"] / self.down.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        values = map(self.get_buffer, ("down", "up", "scaling_rows"))
        h: torch.Tensor = self.base(x)
        for down, up, scaling_row in zip(*values, strict=True):
            part = functional.linear(functional.linear(x, down), up)  # B_i A_i x
            h = h + self.scaling * scaling_row * part
        return h
