"""Task-gated MoE-LoRA's forward pass, written from the paper: parity's oracle.

    h_t = W x + b + s . sum_i g_ti . B_i A_i x        g_t = softmax(gate_t)

Symbols and source: ``mtl_export.adapters.moe_lora``, whose normal form is NOT used here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter, tensors_of
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class MoELoRALinear(FrozenAdapter):
    """A frozen linear layer with E experts, weighted by each row's task.

    Its values are ``down [E, q, I]``, ``up [E, O, q]`` and ``gate [T, E]``.

    Shape:
        x ``[B, ..., I]``; result ``[B, ..., O]``.
    """

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        gates = torch.softmax(tensors_of(layer)["gate"].double(), dim=-1)
        self.gates = gates.to(base.weight.dtype)

    def scaling_of(self, layer: LayerTensors) -> float:
        """Return s = alpha / (E q)."""
        experts, expert_rank, _ = self.down.shape
        return layer.hyper["alpha"] / (experts * expert_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        gates = self.gates[self.routing.rows(x.shape[0])]
        one_per_row = (-1, *[1] * (x.ndim - 1))
        h: torch.Tensor = self.base(x)
        experts = zip(self.down, self.up, strict=True)
        for i, (down, up) in enumerate(experts):
            expert = functional.linear(functional.linear(x, down), up)  # B_i A_i x
            h = h + self.scaling * gates[:, i].view(one_per_row) * expert
        return h
