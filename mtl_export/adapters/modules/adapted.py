"""What every adapted layer shows of the layer whose place it takes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.checkpoint import LayerTensors


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


class FrozenAdapter(AdaptedLayer):
    """A frozen layer with a trained adapter, whose values are buffers named by their role.

    Args:
        base: The layer to adapt; some families change its weight, as their trainer did.
        routing: Says which task each row belongs to.
        layer: The stored values by role, and the numbers beside them.
    """

    down: torch.Tensor  # of the families that have it, as ``up``
    up: torch.Tensor
    embedding: ClassVar[type[FrozenAdapter] | None] = None  # what adapts an nn.Embedding

    def __init__(
        self, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.routing = routing
        for role, value in tensors_of(layer).items():
            self.register_buffer(role, value.to(base.weight.dtype))
        self.scaling = self.scaling_of(layer)

    @classmethod
    def from_tensors(
        cls, base: nn.Linear | nn.Embedding, routing: TaskRouting, layer: LayerTensors
    ) -> FrozenAdapter:
        """Return the layer with a checkpoint's values, in the base layer's dtype."""
        if not isinstance(base, nn.Embedding):
            return cls(base, routing, layer)
        if cls.embedding is None:
            raise TypeError(f"{layer.module}: {cls.__name__} adapts linear layers")
        return cls.embedding(base, routing, layer)

    def scaling_of(self, layer: LayerTensors) -> float:
        """Return s = alpha / r, unless the producer gave s."""
        scaling = layer.hyper.get("scaling")
        if scaling is None:
            scaling = layer.hyper["alpha"] / self.down.shape[0]
        if not math.isfinite(scaling):
            raise ValueError(f"{layer.module}: the scaling {scaling} is not finite")
        return scaling


def tensors_of(layer: LayerTensors) -> dict[str, torch.Tensor]:
    """Return a layer's stored values by role, float32 or float64."""
    return {role: torch.from_numpy(tensor.widened()) for role, tensor in layer.tensors.items()}
