"""A task's own tensors where it has some, else the base's."""

from __future__ import annotations

import numpy as np

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import Head
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names


def own_names(bound: BoundModel) -> frozenset[str]:
    """Return the base tensors in whose place some task has its own; weights are not merged."""
    adapters = bound.adapters
    biases = (names.bias(m) for m, layer in adapters.outlines.items() if layer.bias is not None)
    return frozenset([*adapters.own_tensors, *biases])


def task_tensor(bound: BoundModel, name: str, task_index: int) -> Array:
    """Return what the model of task t has as ``name``; deltas of adapters are not in it."""
    replaced = bound.adapters.replacement(name, task_index)
    if replaced is not None:
        return replaced
    base = bound.base_tensor(name).widened()
    rows = bound.adapters.own_rows(name, task_index)
    return base if rows is None else rows.placed_in(base)


def task_linear(bound: BoundModel, module: str, task_index: int) -> Head:
    """Return task t's linear layer ``module``, ``[O, I]`` however it is stored."""
    stored = task_tensor(bound, f"{module}.weight", task_index)
    weight = stored.T if is_conv1d(bound.base.config, module) else stored
    return Head(weight, task_bias(bound, module, task_index))


def task_bias(bound: BoundModel, module: str, task_index: int) -> Array:
    """Return task t's bias of the linear layer ``module``; zeros if it has none."""
    name = names.bias(module)
    if name.removeprefix(bound.prefix) not in bound.base.tensors:
        weight = bound.base_tensor(f"{module}.weight").shape
        return np.zeros(weight[1] if is_conv1d(bound.base.config, module) else weight[0])
    return task_tensor(bound, name, task_index)
