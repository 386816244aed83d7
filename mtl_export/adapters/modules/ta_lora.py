"""TA-LoRA's forward pass, written from the paper: for training, and as parity's oracle.

    h_t = W x + b + s . (B_0 A_0 x + sum_i g_i(e_t) B_i A_i x)
    g(e_t) = sigmoid(G e_t + c) or softmax(G e_t + c)

Symbols and source: ``mtl_export.adapters.ta_lora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer, tensors_of
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.ta_lora import NAME
from mtl_export.checkpoint.checkpoint import LayerTensors

Gate = Literal["sigmoid", "softmax"]


class TALoRALinear(AdaptedLayer):
    """A frozen linear layer with a TA-LoRA adapter.

    Args:
        base: The layer to adapt; its parameters are frozen.
        routing: Says which task each row belongs to; shared by all layers of a model.
        task_embedding: e ``[T, d]``, a parameter; pass the same one to all layers to share it.
        rank: r of every branch.
        branches: n, without the shared branch.
        alpha: s = alpha / r.
        gate: ``sigmoid`` of each branch, or ``softmax`` over them.
        gate_bias: Add c.
        up_std: Standard deviation of the B_i at the start; small, so that training starts
            close to the base while the branches can grow apart.

    Shape:
        x ``[B, ..., I]``, B rows as in ``routing.task_ids``; result ``[B, ..., O]``.
    """

    family = NAME

    def __init__(
        self,
        base: nn.Linear,
        routing: TaskRouting,
        *,
        task_embedding: nn.Parameter,
        rank: int,
        branches: int,
        alpha: float,
        gate: Gate = "sigmoid",
        gate_bias: bool = True,
        up_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.routing = routing
        self.scaling = alpha / rank
        self.gate_kind = gate
        self.task_embedding = task_embedding
        empty = base.weight.new_empty
        self.down = nn.Parameter(empty(branches + 1, rank, base.in_features))
        self.up = nn.Parameter(empty(branches + 1, base.out_features, rank))
        self.gate = nn.Parameter(empty(branches, task_embedding.shape[1]))
        self.gate_bias = nn.Parameter(torch.zeros_like(empty(branches))) if gate_bias else None
        for branch in self.down:
            nn.init.kaiming_uniform_(branch, a=math.sqrt(5))
        nn.init.normal_(self.up, std=up_std)
        nn.init.normal_(self.gate, std=1.0 / math.sqrt(task_embedding.shape[1]))

    @classmethod
    def from_tensors(
        cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors
    ) -> TALoRALinear:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        values = tensors_of(layer)
        branches, rank, _ = values["down"].shape
        scaling = layer.hyper.get("scaling")
        module = cls(
            base,
            routing,
            task_embedding=nn.Parameter(values.pop("task_embedding").to(base.weight.dtype)),
            rank=rank,
            branches=branches - 1,
            alpha=layer.hyper["alpha"] if scaling is None else scaling * rank,
            gate="softmax" if layer.hyper["gate_softmax"] == 1.0 else "sigmoid",
            gate_bias="gate_bias" in values,
        )
        with torch.no_grad():
            for role, value in values.items():
                module.get_parameter(role).copy_(value)
        return module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained values by role, as a checkpoint stores them."""
        roles = ("down", "up", "task_embedding", "gate", "gate_bias")
        own = dict(self.named_parameters(recurse=False))
        return {role: own[role].detach() for role in roles if role in own}

    def hyper(self) -> dict[str, float]:
        """Return the numbers beside the tensors, as a checkpoint stores them."""
        return {
            "alpha": self.scaling * self.down.shape[1],
            "gate_softmax": float(self.gate_kind == "softmax"),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        embedding = self.task_embedding[self.routing.rows(x.shape[0])]  # e_t of each row
        logits = functional.linear(embedding, self.gate, self.gate_bias)
        g = torch.sigmoid(logits) if self.gate_kind == "sigmoid" else torch.softmax(logits, -1)
        one_per_row = (-1, *[1] * (x.ndim - 1))
        shared, *gated = [
            functional.linear(functional.linear(x, down), up)  # B_i A_i x
            for down, up in zip(self.down, self.up, strict=True)
        ]
        delta = shared
        for i, branch in enumerate(gated):
            delta = delta + g[:, i].view(one_per_row) * branch
        h: torch.Tensor = self.base(x) + self.scaling * delta
        return h
