"""DoRA's forward pass, written from the paper: parity's oracle.

    h = m . (W x + s B A x) / ||W + s B A|| + b

Symbols and source: ``mtl_export.adapters.dora``, whose normal form is NOT used here; a
test holds the two against each other in float64.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter


class DoRAEmbedding(FrozenAdapter):
    """A frozen embedding with a DoRA adapter; one length per embedding dimension.

    Its values are ``down`` ``[r, V]``, V entries, ``up`` ``[O, r]`` and ``magnitude`` ``[O]``.

    Shape:
        ids int64 ``[...]``; result ``[..., O]``.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of ``ids``."""
        lengths = (self.base.weight.T + self.scaling * self.up @ self.down).norm(dim=1)
        z = self.base(ids) + self.scaling * functional.linear(self.down.T[ids], self.up)
        h: torch.Tensor = self.get_buffer("magnitude") * z / lengths
        return h


class DoRALinear(FrozenAdapter):
    """A frozen linear layer with a DoRA adapter.

    Its values are ``down`` ``[r, I]``, ``up`` ``[O, r]`` and ``magnitude`` ``[O]``.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    embedding: ClassVar[type[FrozenAdapter] | None] = DoRAEmbedding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        weight, bias = self.base.weight, self.base.bias
        lengths = (weight + self.scaling * self.up @ self.down).norm(dim=1)
        z = functional.linear(x, weight) + self.scaling * functional.linear(
            functional.linear(x, self.down), self.up
        )
        h: torch.Tensor = self.get_buffer("magnitude") * z / lengths
        return h if bias is None else h + bias
