"""LoRA's forward pass, written from the paper: parity's oracle.

    h = W x + b + s (B A x + b_B)

Symbols and source: ``mtl_export.adapters.lora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


class LoRAEmbedding(FrozenAdapter):
    """A frozen embedding with a LoRA adapter: h_v = W_v + s B A_v, A_v column v of A.

    Its values are ``down`` ``[r, V]``, V entries, and ``up`` ``[O, r]``.

    Shape:
        ids int64 ``[...]``; result ``[..., O]``.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of ``ids``."""
        z = self.down.T[ids]
        h: torch.Tensor = self.base(ids) + self.scaling * functional.linear(z, self.up)
        return h


class LoRALinear(FrozenAdapter):
    """A frozen linear layer with a LoRA adapter.

    Its values are ``down`` ``[r, I]``, ``up`` ``[O, r]`` and maybe ``up_bias`` ``[O]``, with or
    without ``bias`` ``[O]`` in place of the base's.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    embedding: ClassVar[type[FrozenAdapter] | None] = LoRAEmbedding

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        buffers = dict(self.named_buffers(recurse=False))
        self.up_bias = buffers.get("up_bias")
        if "bias" in buffers:
            with torch.no_grad():
                base.bias.copy_(buffers["bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        z = functional.linear(x, self.down)  # A x
        delta = functional.linear(z, self.up, self.up_bias)  # B A x + b_B
        h: torch.Tensor = self.base(x) + self.scaling * delta
        return h


class ChangedBaseLinear(LoRALinear):
    """A LoRA layer on W' in place of W, of which training took a part away."""

    embedding: ClassVar[type[FrozenAdapter] | None] = None

    def __init__(self, base: nn.Linear, routing: TaskRouting, layer: LayerTensors) -> None:
        super().__init__(base, routing, layer)
        with torch.no_grad():
            base.weight.copy_(self.changed(base.weight.double(), self.down.shape[0]))

    @abstractmethod
    def changed(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """Return W', float64 ``[O, I]``, of W and r."""
