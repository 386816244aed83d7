"""AdapterHub's DoRA forward pass, written from its equation: parity's oracle.

    h = m / ||W + B A|| . (W x + b + s B A x)

Symbols and source: ``mtl_export.adapters.adapterhub_dora``, whose normal form is NOT used
here; a test holds the two against each other in float64.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mtl_export.adapters.modules.adapted import FrozenAdapter


class AdapterHubDoRALinear(FrozenAdapter):
    """A frozen linear layer with a DoRA adapter of AdapterHub's kind.

    Its values are ``down`` ``[r, I]``, ``up`` ``[O, r]`` and ``magnitude`` ``[O]``.

    Shape:
        x ``[..., I]``; result ``[..., O]``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return h for every row of ``x``."""
        lengths = (self.base.weight + self.up @ self.down).norm(dim=1)
        added = functional.linear(functional.linear(x, self.down), self.up) * self.scaling
        h: torch.Tensor = self.get_buffer("magnitude") / lengths * (self.base(x) + added)
        return h
