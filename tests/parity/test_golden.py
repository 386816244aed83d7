from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.parity.cases import MIXED, TASK_IDS, Case
from mtl_export.parity.golden import UNKNOWN, for_engine, golden_vectors
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.golden import Vector
from tests.parity.fakes import TASKS, Answer, FakeRunner, exact, right, right_for

FLOORS = {task.name: 1e-6 for task in TASKS}


def of_single_graph(
    cases: list[Case], answer: Answer = right, tolerance: Tolerance | None = None
) -> tuple[Vector, ...]:
    """Return the vectors of a single graph that answers so."""
    with FakeRunner(answer) as runner:
        return golden_vectors(
            runner, "model.onnx", cases, TASKS, task=None, floors=FLOORS,
            tolerance=tolerance or Tolerance(),
        )  # fmt: skip


def test_a_single_graph_keeps_each_task_a_mixed_batch_and_an_unknown_id(cases: list[Case]) -> None:
    """The answers are the candidate's own, and those it refuses are kept as such."""
    vectors = of_single_graph(cases)
    assert [one.name for one in vectors] == [*(task.name for task in TASKS), MIXED, UNKNOWN]
    for task, one in zip(TASKS, vectors, strict=False):
        assert set(one.inputs[TASK_IDS]) == {task.index}
        assert len(one.inputs[TASK_IDS]) == 2
    assert set(vectors[-2].inputs[TASK_IDS]) == {0, 1, 2}
    assert vectors[-1].inputs[TASK_IDS][-1] == len(TASKS)
    assert np.isnan(vectors[-1].outputs["logits"][-1]).all()
    assert np.isfinite(vectors[-1].outputs["logits"][0, 0])
    for one in vectors:
        assert one.model == "model.onnx"
        np.testing.assert_array_equal(one.outputs["logits"], right(one.inputs)["logits"])


def test_a_merged_model_keeps_its_task_alone(cases: list[Case]) -> None:
    """Its inputs have no task ids."""
    with FakeRunner(right_for(1)) as runner:
        (one,) = golden_vectors(
            runner, "model.onnx", cases, TASKS, task=TASKS[1], floors=FLOORS,
            tolerance=Tolerance(),
        )  # fmt: skip
    assert one.name == TASKS[1].name
    assert TASK_IDS not in one.inputs


def test_the_tolerance_is_what_parity_allowed(cases: list[Case]) -> None:
    """A multiple of the floor, or the user's own pair."""
    assert {(one.atol, one.rtol) for one in of_single_graph(cases)} == {(8e-6, 0.0)}
    own = of_single_graph(cases, tolerance=Tolerance(atol=0.5, rtol=0.25))
    assert {(one.atol, one.rtol) for one in own} == {(0.5, 0.25)}


def test_a_runtime_that_refuses_an_unknown_id_keeps_the_rest(cases: list[Case]) -> None:
    """A refusal is no output to save."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs[TASK_IDS].max() >= len(TASKS):
            raise EngineRunError(where="engine", found="id 3")
        return {"logits": exact(inputs)}

    assert [one.name for one in of_single_graph(cases, answer)][-1] == MIXED


def test_an_engine_gets_its_graphs_vectors(cases: list[Case]) -> None:
    """Twice the tolerance, for both may be off; without the id that it refuses."""
    made = for_engine(of_single_graph(cases), "model.engine")
    assert [one.name for one in made] == [*(task.name for task in TASKS), MIXED]
    assert {(one.model, one.atol) for one in made} == {("model.engine", 1.6e-5)}
