"""MTL-LoRA's forward pass, written from the paper: for training, and as parity's oracle.

    h_t = W x + s c . sum_i p_ti . B_i Lambda_t A x        p_t = softmax(w_t / tau)

Symbols and source: ``mtl_export.adapters.mtl_lora``, whose normal form is NOT used
here; a test holds the two against each other in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import AdaptedLayer, tensors_of
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.mtl_lora import NAME
from mtl_export.checkpoint.checkpoint import LayerTensors


class MTLLoRALinear(AdaptedLayer):
    """A frozen linear layer with an MTL-LoRA adapter.

    Args:
        base: The layer to adapt; its parameters are frozen.
        routing: Says which task each row belongs to; shared by all layers of a model.
        tasks: T.
        rank: r.
        up_projections: n.
        alpha: s = alpha / r.
        temperature: tau > 0.
        lambda_format: ``full`` [r, r] or ``diagonal`` [r] per task.
        learn_scale: Add the learnt scale c = sigmoid(scaler).
        up_std: Standard deviation of the B_i at the start. With 0, as plain LoRA does, all
            B_i get the same gradient for ever and n > 1 is pure redundancy; a small
            value keeps the start close to the base and lets the B_i differ.

    Shape:
        x ``[B, ..., I]``, B rows as in ``routing.task_ids``; result ``[B, ..., O]``.
    """

    family = NAME

    def __init__(
        self,
        base: nn.Linear,
        routing: TaskRouting,
        *,
        tasks: int,
        rank: int,
        up_projections: int,
        alpha: float,
        temperature: float,
        lambda_format: Literal["full", "diagonal"] = "full",
        learn_scale: bool = False,
        up_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.routing = routing
        self.scaling = alpha / rank
        self.temperature = temperature
        empty = base.weight.new_empty
        identity = torch.eye(rank) if lambda_format == "full" else torch.ones(rank)
        self.down = nn.Parameter(empty(rank, base.in_features))
        self.lambdas = nn.Parameter(identity.to(base.weight).repeat(tasks, *[1] * identity.ndim))
        self.up = nn.Parameter(empty(up_projections, base.out_features, rank))
        self.mixing = nn.Parameter(torch.zeros_like(empty(tasks, up_projections)))
        self.scaler = nn.Parameter(torch.zeros_like(empty(()))) if learn_scale else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.normal_(self.up, std=up_std)

    @classmethod
    def from_tensors(
        cls, base: nn.Linear, routing: TaskRouting, layer: LayerTensors
    ) -> MTLLoRALinear:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        values = tensors_of(layer)
        up_projections, _, rank = values["up"].shape
        module = cls(
            base,
            routing,
            tasks=values["mixing"].shape[0],
            rank=rank,
            up_projections=up_projections,
            alpha=layer.hyper["alpha"],
            temperature=layer.hyper["temperature"],
            lambda_format="full" if values["lambda"].ndim == 3 else "diagonal",
            learn_scale="scaler" in values,
        )
        with torch.no_grad():
            for role, value in values.items():
                parameter = module.lambdas if role == "lambda" else getattr(module, role)
                parameter.copy_(value)
        return module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the trained values by role, as a checkpoint stores them."""
        values = {
            "down": self.down,
            "lambda": self.lambdas,
            "up": self.up,
            "mixing": self.mixing,
        }
        if self.scaler is not None:
            values["scaler"] = self.scaler
        return {role: value.detach() for role, value in values.items()}

    def hyper(self) -> dict[str, float]:
        """Return the numbers beside the tensors, as a checkpoint stores them."""
        return {
            "alpha": self.scaling * self.down.shape[0],
            "temperature": self.temperature,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        task_ids = self.routing.rows(x.shape[0])
        one_per_row = (-1, *[1] * (x.ndim - 1))
        z = functional.linear(x, self.down)  # A x
        lambdas = self.lambdas[task_ids]
        if lambdas.ndim == 2:
            z = z * lambdas.view(lambdas.shape[0], *[1] * (x.ndim - 2), -1)
        else:
            z = torch.einsum("brd,b...d->b...r", lambdas, z)  # Lambda_t A x
        p = torch.softmax(self.mixing[task_ids] / self.temperature, dim=-1)
        mixed: torch.Tensor | float = 0.0
        for i, up in enumerate(self.up):
            mixed = mixed + p[:, i].view(one_per_row) * functional.linear(z, up)  # p_ti B_i (...)
        scale: torch.Tensor | float = self.scaling
        if self.scaler is not None:
            scale = scale * torch.sigmoid(self.scaler)
        h: torch.Tensor = self.base(x) + scale * mixed
        return h
