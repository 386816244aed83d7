"""Initializers that are computed when the file is written, one at a time.

A lowered graph of T tasks would otherwise hold T copies of the model in memory. What every
task's graph holds alike is marked, so that it can be written once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array

_COMMON = "mtl_export.common"
_ADDED = "mtl_export.added"
_MARKABLE = (ir.Tensor, ir.LazyTensor, ir.ExternalTensor)


def add_initializer(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    values: Callable[[], Array],
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    common: bool = False,
) -> ir.Value:
    """Return an initializer of ``graph`` whose values are computed on use.

    One that was added under this name before, for another use of its module, is returned again.

    Args:
        graph: The graph.
        name: The initializer's name.
        shape: Shape of the values.
        values: Returns them.
        dtype: FLOAT or INT64.
        common: Every task's graph has the same values under this name.
    """
    known = graph.initializers.get(name)
    if known is not None and known.meta.get(_ADDED):
        return known
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(values(), dtype=dtype.numpy()), name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    tensor.meta[_COMMON] = common
    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(dtype),
        const_value=tensor,
    )
    value.meta[_ADDED] = True
    graph.register_initializer(value)
    return value


def mark_common(model: ir.Model) -> None:
    """Mark what ``model``, a trace, holds: it is the same for every task."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, _MARKABLE):
                value.const_value.meta[_COMMON] = True


def is_common(tensor: ir.TensorProtocol) -> bool:
    """Return whether every task's graph holds this tensor alike."""
    return isinstance(tensor, _MARKABLE) and bool(tensor.meta.get(_COMMON))
