"""What every adapted layer shows of the layer whose place it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class AdaptedLayer(nn.Module):
    """A layer in the place of another, which it keeps as ``base``.

    Some models ask their layers for the weight's dtype before they call them: T5 does.
    """

    base: Any

    @property
    def weight(self) -> torch.Tensor:
        """Return the frozen weight, without the adapter."""
        weight: torch.Tensor = self.base.weight
        return weight
