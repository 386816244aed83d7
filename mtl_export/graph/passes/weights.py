"""Initializers that are computed when the file is written, one at a time.

A lowered graph of T tasks would otherwise hold T copies of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array


def add_initializer(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    values: Callable[[], Array],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """Return a new initializer of ``graph`` whose values are computed on use.

    Args:
        graph: The graph.
        name: The initializer's name.
        shape: Shape of the values.
        values: Returns them.
        dtype: FLOAT or INT64.
    """
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(values(), dtype=dtype.numpy()), name=name),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
