"""Task-gated MoE-LoRA's forward pass, written from the paper: parity's oracle.

    h_t = W x + b + s . sum_i g_ti . B_i A_i x        g_t = softmax(gate_t)

Symbols and source: ``mtl_export.adapters.moe_lora``, whose normal form is NOT used here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer
from mtl_export.adapters.modules.lora import tensors_of
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class MoELoRALinear(AdaptedLayer):
    """A frozen linear layer with E experts, weighted by each row's task.

    Args:
        base: The layer to adapt.
        routing: Says which task each row belongs to.
        layer: With ``down [E, q, I]``, ``up [E, O, q]``, ``gate [T, E]`` and ``alpha``.

    Shape:
        x ``[B, ..., I]``; result ``[B, ..., O]``.
    """

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.routing = routing
        values = tensors_of(layer)
        self.gates = torch.softmax(values.pop("gate").double(), dim=-1).to(base.weight.dtype)
        self.experts = [
            (down.to(base.weight.dtype), up.to(base.weight.dtype))
            for down, up in zip(values["down"], values["up"], strict=True)
        ]
        experts, expert_rank, _ = values["down"].shape
        self.scaling = layer.hyper["alpha"] / (experts * expert_rank)

    @classmethod
    def from_tensors(
        cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors
    ) -> MoELoRALinear:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        return cls(base, routing, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        gates = self.gates[self.routing.rows(x.shape[0])]
        one_per_row = (-1, *[1] * (x.ndim - 1))
        h: torch.Tensor = self.base(x)
        for i, (down, up) in enumerate(self.experts):
            expert = functional.linear(functional.linear(x, down), up)  # B_i A_i x
            h = h + self.scaling * gates[:, i].view(one_per_row) * expert
        return h
