from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.graph.passes.merge_task import MergeTaskPass
from tests.graph import marked
from tests.graph.passes.test_markers import IN_A_BRANCH, NEAR_MISS


def merged(task_index: int, text: str = marked.GRAPH) -> tuple[ir.Model, bool]:
    """Return the graph lowered to one task, and whether the pass says it changed it."""
    result = MergeTaskPass(marked.bound(), marked.TASKS[task_index])(marked.model(text))
    return result.model, result.modified


def test_markers_become_stock_layers_and_nothing_else_changes() -> None:
    """Three linear layers and a head become four MatMul and three Add; Relu and Gather stay."""
    model, modified = merged(0)
    assert modified
    assert marked.counts(model) == {
        ("", "MatMul"): 4, ("", "Add"): 3, ("", "Relu"): 1, ("", "Gather"): 1,
        ("", "Constant"): 1,
    }  # fmt: skip


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_numbers_are_the_tasks_own(task: int) -> None:
    """Each lowered graph answers as its task's merged weights, bias and head do."""
    model, _ = merged(task)
    x = np.random.default_rng(4).normal(size=(3, 2, 5)).astype(np.float32)
    labels = len(marked.TASKS[task].labels)
    expected = marked.logits(x, np.full(3, task))[:, :labels]
    np.testing.assert_allclose(marked.evaluate(model, x=x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_output_is_as_wide_as_the_tasks_labels(task: int) -> None:
    """The declared output shape follows the head."""
    model, _ = merged(task)
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert [str(dim) for dim in shape] == ["batch", str(len(marked.TASKS[task].labels))]


def test_the_bias_is_the_traced_initializer_and_comes_last() -> None:
    """A biased layer ends in Add(product, bias); one without bias ends in its MatMul."""
    model, _ = merged(1)
    producers = {node.outputs[0].name: node for node in model.graph}
    last = producers["h"]
    assert last.op_type == "Add"
    assert last.inputs[1] is model.graph.initializers["wide_bias"]
    assert producers["n"].op_type == "MatMul"


def test_weights_are_named_after_their_modules() -> None:
    """Every merged weight lies transposed under its state-dict name plus _t."""
    model, _ = merged(2)
    for module, (outputs, inputs) in marked.SIZES.items():
        initializer = model.graph.initializers[f"{module}.weight_t"]
        assert initializer.const_value is not None
        assert initializer.const_value.shape == (inputs, outputs)
        expected = marked.values()[f"{module}.weight"] + marked.bound().adapters.layers[
            module
        ].delta(2)
        np.testing.assert_allclose(
            initializer.const_value.numpy(), expected.T, rtol=1e-6, atol=1e-6
        )


def test_markers_in_branches_are_lowered() -> None:
    """A layer inside an If is merged where it stands; the other branch keeps the base's."""
    model, _ = merged(1, IN_A_BRANCH)
    first = np.random.default_rng(5).normal(size=(2, 6)).astype(np.float32)
    weight, bias = (marked.values()[f"pool.{kind}"] for kind in ("weight", "bias"))
    own = weight + marked.bound().adapters.layers["pool"].delta(1)
    for condition, expected in ((True, own), (False, weight)):
        found = marked.evaluate(model, first=first, c=np.array(condition))
        np.testing.assert_allclose(found, first @ expected.T + bias, rtol=1e-5, atol=1e-5)


def test_a_near_miss_is_left_alone() -> None:
    """Nodes that only look like markers are not touched, and nothing is said to change."""
    before = ir.to_proto(marked.model(NEAR_MISS)).SerializeToString(deterministic=True)
    model, modified = merged(0, NEAR_MISS)
    assert not modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_marker_that_stays_is_caught() -> None:
    """A pass that forgets a marker fails instead of handing the graph on."""

    class Forgetful(MergeTaskPass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, modified=False)

    with pytest.raises(ir.passes.PostconditionError, match="markers left"):
        Forgetful(marked.bound(), marked.TASKS[0])(marked.model())
