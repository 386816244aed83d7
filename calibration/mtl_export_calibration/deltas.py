"""Does a weight's quantisation step swallow what a task changes?

Row o of a weight is rounded to multiples of its step; a task whose largest change of that
row is smaller than the step may be rounded away there. A layer of a merged graph for which
that holds in at least half of the rows is treated as the user asks

    apart     base quantised, delta added in high precision:
              MatMul(x, Q(gain W)) + (x . right) . left
    exclude   left in high precision
    merged    quantised with the delta inside, and reported

The single graph always keeps its low-rank path apart; there the numbers are for information.

O outputs, I inputs, K inner rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.merge.fold import Delta, task_delta
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.weights import weight_grid

APART, EXCLUDE, MERGED = DELTA_MODES = ("apart", "exclude", "merged")
SWALLOWED = 0.5


@dataclass(frozen=True, slots=True)
class ApartWeight:
    """A task's weight as the base's and a low-rank rest.

    Attributes:
        base: float32 ``[I, O]``, gains included.
        down: float32 ``[I, K]``.
        up: float32 ``[K, O]``, gains included.
    """

    base: Array
    down: Array
    up: Array


class DeltaSource:
    """What tasks change in the layers of one model.

    Args:
        bound: The adapter and its base.
        task: The task of a merged graph; None for the single graph.
    """

    def __init__(self, bound: BoundModel, task: Task | None) -> None:
        self._bound = bound
        self.task = task

    def swallowed(self, layer: QuantLayer, number: NumberFormat, weight: Array) -> dict[str, float]:
        """Return by task which share of rows has a step above the task's largest change.

        Args:
            layer: A layer of the graph.
            number: What its weight is quantised to.
            weight: As it is in the graph, ``[I, O]``.
        """
        if self._adapter(layer) is None:
            return {}
        step = weight_grid(weight, layer, number).step(weight)
        shares = {}
        for task in [self.task] if self.task else self._bound.adapters.tasks:
            change = self._change(layer, task)
            if change is not None:
                shares[task.name] = float((step > change).mean())
        return shares

    def apart(self, layer: QuantLayer) -> ApartWeight | None:
        """Return the weight of a merged graph's layer as base and rest; None without a rest."""
        delta = self._delta(layer, self.task) if self.task else None
        if delta is None:
            return None
        left, right = (
            (delta.right.T, delta.left.T) if delta.transposed else (delta.left, delta.right)
        )
        base, up = self._base(layer.name), left.T
        if delta.gain is not None:
            base, up = base * delta.gain, up * delta.gain
        return ApartWeight(*(np.ascontiguousarray(v, np.float32) for v in (base, right.T, up)))

    def _adapter(self, layer: QuantLayer) -> object | None:
        if layer.op_type != "MatMul":
            return None
        return self._bound.adapters.layers.get(layer.name)

    def _delta(self, layer: QuantLayer, task: Task) -> Delta | None:
        if self._adapter(layer) is None:
            return None
        return task_delta(self._bound.adapters.layers[layer.name], task.index)

    def _change(self, layer: QuantLayer, task: Task) -> Array | None:
        """Return the largest change of each row ``[O]``; None where the task changes none."""
        delta = self._delta(layer, task)
        if delta is None:
            return None
        change = delta.left @ delta.right
        change = change if delta.transposed else change.T
        if delta.gain is not None:
            base = self._base(layer.name)
            change = (change + base) * delta.gain - base
        largest: Array = np.abs(change).max(axis=0)
        return largest

    def _base(self, module: str) -> Array:
        """Return the base weight, float64 ``[I, O]``."""
        stored = self._bound.base_tensor(f"{module}.weight").widened().astype(np.float64)
        return stored if is_conv1d(self._bound.base.config, module) else stored.T


def swallowed_layers(shares: dict[str, dict[str, float]], tasks: Sequence[str]) -> list[str]:
    """Return the layers in which at least ``SWALLOWED`` of a task's rows may be rounded away."""
    return [
        name
        for name, by_task in shares.items()
        if any(by_task.get(task, 0.0) >= SWALLOWED for task in tasks)
    ]
