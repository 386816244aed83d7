"""A part that no task changes: known rows keep their bits, unknown ids get no answer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.passes.guard_outputs import GuardOutputsPass
from mtl_export.graph.passes.route_tasks import RouteTasksPass
from mtl_export.graph.passes.routing import TaskInput
from tests.graph import marked

PLAIN = """
<ir_version: 10, opset_import: ["" : 20]>
toy (float[batch, sequence, 5] x)
    => (float[batch, sequence, 5] states, int64[3] size, float[batch, sequence, 5] keys)
{
    states = Relu (x)
    size = Shape (x)
    keys = Neg (x)
}
"""
KEYS = "present.0.key"
X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def guarded(task_input: TaskInput) -> ir.Model:
    """Return the plain graph after the passes that a routed graph goes through."""
    model = ir.from_proto(onnx.parser.parse_model(PLAIN))
    model.graph.outputs[-1].name = KEYS
    for step in (RouteTasksPass(marked.bound(), task_input), GuardOutputsPass()):
        model = step(model).model
    return model


def run(model: ir.Model, ids: list[int]) -> list[Array]:
    """Return the outputs, after a full check."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return list(ReferenceEvaluator(proto).run(None, {"x": X, "task_ids": np.array(ids)}))


def test_rows_of_unknown_ids_are_poisoned() -> None:
    """Others keep their bits; sizes and keys are no answers and stay."""
    model = guarded("rows")
    assert [value.name for value in model.graph.outputs] == ["states", "size", KEYS]
    states, size, key = run(model, [0, len(marked.TASKS), 2])
    assert np.isnan(states[1]).all()
    np.testing.assert_array_equal(states[[0, 2]], np.maximum(X, 0)[[0, 2]])
    assert size.tolist() == [3, 4, 5]
    np.testing.assert_array_equal(key, -X)


@pytest.mark.parametrize(("task", "is_known"), [(2, True), (-1, False)])
def test_one_id_for_the_whole_batch(task: int, is_known: bool) -> None:
    """A scalar id poisons every row or none."""
    states = run(guarded("scalar"), [task])[0]
    assert np.isnan(states).all() != is_known
    assert np.isfinite(states).all() == is_known


def test_an_output_beside_the_adapted_one_is_guarded() -> None:
    """As a pooler's states: known rows keep their bits, and what is computed from them its own."""
    lines = marked.GRAPH.replace(
        "=> (float[batch, 4] logits)",
        """=> (float[batch, 4] logits,
    float[batch, sequence, 5] states)""",
    ).replace("h = mtl", "states = Relu (x)\n h = mtl")
    model = marked.model(lines.replace("(x, wide", "(states, wide"))
    for step in (RouteTasksPass(marked.bound()), GuardOutputsPass()):
        model = step(model).model
    assert [value.name for value in model.graph.outputs] == ["logits", "states"]
    logits, states = run(model, [0, len(marked.TASKS), 2])
    assert np.isnan(states[1]).all()
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(states[[0, 2]], np.maximum(X, 0)[[0, 2]])
    assert "logits/guard" not in {node.name for node in model.graph}


def test_a_graph_with_adapted_layers_is_left_alone() -> None:
    """Its stacks are poisoned already."""
    model = RouteTasksPass(marked.bound())(marked.model()).model
    before = len(list(model.graph))
    result = GuardOutputsPass()(model)
    assert not result.modified
    assert len(list(result.model.graph)) == before
