from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.passes.route_tasks import RouteTasksPass
from tests.graph import marked
from tests.graph.passes.test_markers import NEAR_MISS


def routed(text: str = marked.GRAPH) -> ir.Model:
    """Return the graph lowered for all tasks."""
    return RouteTasksPass(marked.bound())(marked.model(text)).model


def rows(count: int, sequence: int = 2) -> Array:
    """Return seeded float32 inputs."""
    generator = np.random.default_rng(4)
    return generator.normal(size=(count, sequence, 5)).astype(np.float32)


def test_markers_become_stock_gemms_and_custom_gathers() -> None:
    """Exact counts: a stock MatMul each, one delta each, biases last, and the guard of the ids."""
    assert marked.counts(routed()) == {
        ("", "MatMul"): 3, ("", "Add"): 5, ("", "Relu"): 1, ("", "Gather"): 1,
        ("", "Constant"): 4, ("", "GreaterOrEqual"): 1, ("", "Less"): 2, ("", "And"): 2,
        ("", "Cast"): 1, ("", "Abs"): 1,
        ("", "Where"): 1, ("mtl_export", "TaskDelta"): 2, ("mtl_export", "TaskDeltaRows"): 1,
        ("mtl_export", "TaskHeadRows"): 1,
    }  # fmt: skip


def test_functions_are_those_used() -> None:
    """Each custom op comes with its body, in our domain, and no other does."""
    model = routed()
    assert sorted(key[:2] for key in model.functions) == [
        ("mtl_export", "TaskDelta"),
        ("mtl_export", "TaskDeltaRows"),
        ("mtl_export", "TaskHeadRows"),
    ]
    for function in model.functions.values():
        assert {node.domain for node in function} == {""}
    assert model.opset_imports["mtl_export"] == 1


def test_the_input_is_task_ids_int64_batch() -> None:
    """task_ids is added behind the model's own inputs."""
    task_ids = routed().graph.inputs[-1]
    assert task_ids.name == "task_ids"
    assert task_ids.dtype == ir.DataType.INT64
    assert task_ids.shape == ir.Shape(["batch"])


def test_every_row_gets_its_own_task() -> None:
    """A mixed batch equals each row computed alone with its task; labels it lacks are -inf."""
    x, ids = rows(7), np.array([2, 0, 1, 1, 0, 2, 0])
    found = marked.evaluate(routed(), x=x, task_ids=ids)
    expected = marked.logits(x, ids)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [3, 4, -1, -3, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_an_unknown_id_is_nan_in_its_row_only(bad: int) -> None:
    """Ids outside [0, T) answer NaN everywhere, and their neighbours do not notice."""
    x, model = rows(4), routed()
    good = marked.evaluate(model, x=x, task_ids=np.array([1, 0, 2, 1]))
    found = marked.evaluate(model, x=x, task_ids=np.array([1, bad, 2, 1]))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2, 3]], good[[0, 2, 3]])


def test_every_stack_ends_in_nan() -> None:
    """Row T, and only row T, of every gathered initializer is NaN."""
    initializers = routed().graph.initializers
    names = [f"{module}.core" for module in marked.SIZES] + ["head.weights", "head.biases"]
    for name in names:
        value = initializers[name].const_value
        assert value is not None
        array = value.numpy()
        assert len(array) == len(marked.TASKS) + 1
        assert np.isnan(array[-1]).all()
        assert not np.isnan(array[:-1]).any()


def test_the_base_product_is_stock_and_the_bias_comes_last() -> None:
    """MatMul takes the base weight transposed; Add(bias) is the layer's last node."""
    model = routed()
    producers = {value.name: node for node in model.graph for value in node.outputs}
    last = producers["h"]
    assert last.op_type == "Add"
    assert last.inputs[1] is model.graph.initializers["wide_bias"]
    adapted = last.inputs[0]
    assert adapted is not None
    adapted_node = adapted.producer()
    assert adapted_node is not None
    assert adapted_node.op_type == "Add"
    product, delta = adapted_node.inputs
    assert product is not None
    assert delta is not None
    matmul, call = product.producer(), delta.producer()
    assert matmul is not None
    assert call is not None
    assert (matmul.domain, matmul.op_type) == ("", "MatMul")
    assert (call.domain, call.op_type) == ("mtl_export", "TaskDelta")
    weight = matmul.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    base = marked.values()["enc.wide.weight"]
    np.testing.assert_array_equal(weight.const_value.numpy(), base.T)
    assert producers["n"].inputs[1] is not None
    assert producers["n"].inputs[1].producer() is not None, "a layer without bias ends in its delta"


@pytest.mark.parametrize(
    ("old", "new", "module"),
    [
        ("float[batch, 6] first", "float[rows, 6] first", "pool"),
        ("float[batch, 6] first", "float[3, 6] first", "pool"),
        ("float[batch, 3] p", "float[p_rows, 3] p", "head"),
        ("float[batch, sequence, 7] r", "float[windows, sequence, 7] r", "enc.narrow"),
        (", float[batch, 3] p", "", "head"),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(old: str, new: str, module: str) -> None:
    """An input whose rows are not the batch's is refused with layer, shape and way out."""
    assert marked.GRAPH.count(old) == 1
    with pytest.raises(GraphError) as caught:
        routed(marked.GRAPH.replace(old, new))
    assert caught.value.problem.startswith(module)
    assert "shape" in caught.value.problem
    assert "batch" in caught.value.expected
    assert "--layout per-task" in caught.value.fix


def test_a_near_miss_keeps_its_nodes() -> None:
    """Nodes that only look like markers stay; no function is added for them."""
    model = routed(NEAR_MISS)
    found = marked.counts(model)
    assert found["vendor", "TaskLinear"] == 1
    assert found["mtl_export", "TaskOther"] == 1
    assert ("", "MatMul") not in found
    assert not model.functions


def test_a_marker_that_stays_is_caught() -> None:
    """A pass that forgets a marker fails instead of handing the graph on."""

    class Forgetful(RouteTasksPass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, modified=False)

    with pytest.raises(ir.passes.PostconditionError, match="markers left"):
        Forgetful(marked.bound())(marked.model())
