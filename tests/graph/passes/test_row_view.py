"""Layers whose rows are not the batch's, lowered and run: each row keeps its task."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph import names
from mtl_export.graph.passes.markers import markers
from mtl_export.graph.passes.route_tasks import RouteTasksPass
from tests.graph import marked

B, T = 3, len(marked.TASKS)
IDS = np.array([2, 0, 1])
MODULE, HEAD = "enc.wide", "head"
LINEAR = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[{shape}, 5] x) => (float[{shape}, 7] y)
{{ y = mtl_export.TaskLinear <module = "enc.wide"> (x, wide_weight, wide_bias) }}
"""
TOKEN_HEAD = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[{shape}, 3] x) => (float[{shape}, 4] y)
{{ y = mtl_export.TaskHead <module = "head"> (x) }}
"""
# shape of x without its features, the order, x's sizes, and the row of the batch of each x
CASES = [
    pytest.param("batch, h, w", "", (B, 2, 4), lambda i: i[0], id="height and width"),
    pytest.param("n", "repeated", (B * 4,), lambda i: i[0] // 4, id="packed"),
    pytest.param("n, s", "repeated", (B * 4, 2), lambda i: i[0] // 4, id="windows"),
    pytest.param("n, h, w", "repeated", (B * 4, 2, 5), lambda i: i[0] // 4, id="high windows"),
    pytest.param("n", "tiled", (B * 4,), lambda i: i[0] % B, id="packed by position"),
    pytest.param("n, s", "tiled", (B * 4, 2), lambda i: i[0] % B, id="tiled"),
    pytest.param("s, batch", "second", (4, B), lambda i: i[1], id="sequence first"),
    pytest.param("s, batch, w", "second", (4, B, 2), lambda i: i[1], id="height first"),
]


def routed(text: str, order: str, task_input: str = "rows") -> ir.Model:
    """Return the graph, its marker's order noted, lowered."""
    model = marked.model(text)
    if order:
        attribute = ir.AttrString(names.ROWS_ATTRIBUTE, order)
        markers(model)[0].attributes[names.ROWS_ATTRIBUTE] = attribute
    return RouteTasksPass(marked.bound(), task_input)(model).model  # type: ignore[arg-type]


def linear(x: Array, task: int) -> Array:
    """Return what the layer gives a vector under a task."""
    tensors, layer = marked.values(), marked.bound().adapters.layers[MODULE]
    weight = tensors[f"{MODULE}.weight"] + layer.delta(task)
    result: Array = weight @ x + tensors[f"{MODULE}.bias"]
    return result


def head(x: Array, task: int) -> Array:
    """Return what a task's head gives a vector, as wide as the widest."""
    own = marked.bound().adapters.heads[HEAD][task]
    y = np.full(4, -np.inf)
    y[: len(own.bias)] = own.weight @ x + own.bias
    return y


@pytest.mark.parametrize(("shape", "order", "sizes", "row_of"), CASES)
@pytest.mark.parametrize("kind", ["linear", "head"])
def test_rows_keep_their_task(shape: str, order: str, sizes, row_of, kind: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Whatever order the rows come in, each is computed under the task of its own."""
    text, formula, features = (LINEAR, linear, 5) if kind == "linear" else (TOKEN_HEAD, head, 3)
    x = np.random.default_rng(0).normal(size=(*sizes, features)).astype(np.float32)
    found = marked.evaluate(routed(text.format(shape=shape), order), x=x, task_ids=IDS)
    expected = np.empty_like(found)
    for index in np.ndindex(*sizes):
        expected[index] = formula(x[index], IDS[row_of(index)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    bad = IDS.copy()
    bad[1] = T
    poisoned = marked.evaluate(routed(text.format(shape=shape), order), x=x, task_ids=bad)
    for index in np.ndindex(*sizes):
        if row_of(index) == 1:
            assert np.isnan(poisoned[index]).all()
        else:
            np.testing.assert_array_equal(poisoned[index], found[index])


@pytest.mark.parametrize("shape", ["batch", "n", "batch, s", "s, h, batch, w"])
@pytest.mark.parametrize("kind", ["linear", "head"])
def test_one_task_needs_no_order(shape: str, kind: str) -> None:
    """With one task for the whole batch rows of any number and order are computed under it."""
    text, formula, features = (LINEAR, linear, 5) if kind == "linear" else (TOKEN_HEAD, head, 3)
    sizes = tuple(range(2, 2 + len(shape.split(","))))
    model = routed(text.format(shape=shape), "", "scalar")
    assert model.graph.inputs[-1].shape == ir.Shape([1])
    x = np.random.default_rng(0).normal(size=(*sizes, features)).astype(np.float32)
    for task in range(T):
        found = marked.evaluate(model, x=x, task_ids=np.array([task]))
        for index in np.ndindex(*sizes):
            np.testing.assert_allclose(found[index], formula(x[index], task), rtol=1e-4, atol=1e-4)
    for bad in (-1, T, 2**32):
        assert np.isnan(marked.evaluate(model, x=x, task_ids=np.array([bad]))).all()


def test_a_plain_layer_is_not_reshaped() -> None:
    """[B, S, I] needs no view; packed rows gather one core for each row of the batch."""
    plain = marked.counts(routed(LINEAR.format(shape="batch, s"), ""))
    assert not {key for key in plain if key[1] in {"Reshape", "Transpose", "Shape"}}
    packed = marked.counts(routed(LINEAR.format(shape="n"), "repeated"))
    assert packed["mtl_export", "TaskDelta"] == 1
    assert packed["", "Reshape"] == 2
    assert ("", "Transpose") not in packed


def test_an_order_that_was_not_found_is_refused() -> None:
    """With the layer, its shape and both ways out."""
    with pytest.raises(GraphError) as caught:
        routed(LINEAR.format(shape="n"), "")
    assert caught.value.problem.startswith(MODULE)
    assert "[n,5]" in caught.value.problem
    assert "--layout per-task" in caught.value.fix
    assert "--task-input scalar" in caught.value.fix
