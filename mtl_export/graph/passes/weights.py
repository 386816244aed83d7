"""Initializers that are computed when the file is written, one at a time.

A lowered graph of T tasks would otherwise hold T copies of the model in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array


def add_initializer(
    graph: ir.Graph, name: str, shape: tuple[int, ...], values: Callable[[], Array]
) -> ir.Value:
    """Return a new float32 initializer of ``graph`` whose values are computed on use."""
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(values(), dtype=np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
    )
    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
