from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.passes.weights import add_initializer
from tests.graph import marked


def test_values_are_computed_only_when_they_are_asked_for() -> None:
    """An initializer has name, type and shape before its values exist."""
    graph = marked.model().graph
    calls = []

    def values() -> Array:
        calls.append(1)
        return np.arange(6.0).reshape(3, 2).T

    value = add_initializer(graph, "enc.wide.extra", (2, 3), values)
    assert graph.initializers["enc.wide.extra"] is value
    assert value.dtype == ir.DataType.FLOAT
    assert value.shape == ir.Shape((2, 3))
    assert not calls
    assert value.const_value is not None
    array = value.const_value.numpy()
    assert calls
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[0, 2, 4], [1, 3, 5]])
    assert value.const_value.tobytes() == array.tobytes()
