from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.names import TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import MIXED, Case
from mtl_export.parity.golden import STEPS, UNKNOWN, for_engine, golden_vectors
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.golden import Vector
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS
from tests.parity.fakes import TASKS, Answer, FakeRunner, exact, right, right_for

FLOORS = {task.name: 1e-6 for task in TASKS}


def shipped(runner: Runner, task: Task | None = None) -> Artefact:
    """Return a graph with this runner."""
    kind = "single-graph" if task is None else "per-task"
    return Artefact("name", kind, runner, task, "fp32", "", "", path=Path("model.onnx"))


def of_single_graph(
    cases: list[Case], answer: Answer = right, tolerance: Tolerance | None = None
) -> tuple[Vector, ...]:
    """Return the vectors of a single graph that answers so."""
    with FakeRunner(answer) as runner:
        return golden_vectors(shipped(runner), cases, TASKS, FLOORS, tolerance or Tolerance())


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
        (one,) = golden_vectors(shipped(runner, TASKS[1]), cases, TASKS, FLOORS, Tolerance())
    assert one.name == TASKS[1].name
    assert TASK_IDS not in one.inputs


def test_the_tolerance_is_what_parity_allowed(cases: list[Case]) -> None:
    """A multiple of the floor, or the user's own pair where it is narrower."""
    assert {(one.atol, one.rtol) for one in of_single_graph(cases)} == {(8e-6, 0.0)}
    own = of_single_graph(cases, tolerance=Tolerance(atol=1e-7, rtol=1e-8))
    assert {(one.atol, one.rtol) for one in own} == {(1e-7, 1e-8)}


def test_a_wide_tolerance_is_not_kept(cases: list[Case]) -> None:
    """What is saved is the candidate's own answer: another runtime gives it but for arithmetic."""
    for wide in (Tolerance(atol=1e9, rtol=0.0), Tolerance(atol=0.0, rtol=1e9)):
        for one in of_single_graph(cases, tolerance=wide):
            largest = np.nanmax(np.abs(one.outputs["logits"]), where=np.isfinite(
                one.outputs["logits"]), initial=0.0)  # fmt: skip
            assert one.atol + one.rtol * largest <= 8.01e-6
            wrong = {name: value + 1e-3 for name, value in one.outputs.items()}
            assert "differ" in one.difference(wrong)


def test_a_runtime_that_refuses_an_unknown_id_keeps_the_rest(cases: list[Case]) -> None:
    """A refusal is no output to save."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs[TASK_IDS].max() >= len(TASKS):
            raise EngineRunError("engine: id 3")
        return {"logits": exact(inputs)}

    assert [one.name for one in of_single_graph(cases, answer)][-1] == MIXED


def test_an_engine_gets_its_graphs_vectors(cases: list[Case]) -> None:
    """Twice the tolerance, for both may be off; without the id that it refuses."""
    made = for_engine(of_single_graph(cases), "model.engine")
    assert [one.name for one in made] == [*(task.name for task in TASKS), MIXED]
    assert {(one.model, one.atol) for one in made} == {("model.engine", 1.6e-5)}


def of_language_model(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Answer each token, or each new one; NaN for padding, which nobody may look at."""
    shape = inputs[NEW_TOKENS if NEW_TOKENS in inputs else "input_ids"].shape
    logits = np.broadcast_to(exact(inputs)[:, None], (*shape, 4)).copy()
    if NEW_TOKENS not in inputs:
        logits[inputs["attention_mask"] == 0] = np.nan
    return {"logits": logits}


def test_a_language_model_keeps_a_batch_of_steps_and_no_padding(cases: list[Case]) -> None:
    """Prompts are cut to the tokens that all rows have; new tokens are fed after whole ones."""
    mixed = next(case for case in cases if case.name == MIXED)
    tokens = np.ones((len(mixed.task_ids), 3), np.int64)
    spoken = Case("3 steps", {**mixed.inputs, NEW_TOKENS: tokens})
    vectors = of_single_graph([*cases, spoken], of_language_model)
    names = [one.name for one in vectors]
    assert names == [*(task.name for task in TASKS), STEPS, MIXED, UNKNOWN]
    for one in vectors:
        if one.name == STEPS:
            assert one.inputs[NEW_TOKENS].shape[1] == one.outputs["logits"].shape[1] == 3
        else:
            assert (one.inputs["attention_mask"] == 1).all()
            assert one.inputs["input_ids"].shape == one.outputs["logits"].shape[:2]
            assert np.isfinite(one.outputs["logits"][0, :, 0]).all()
    merged = [Case(spoken.name, spoken.inputs)]
    with FakeRunner(lambda inputs: of_language_model({**inputs, **ids_of(inputs)})) as runner:
        of_task = golden_vectors(
            shipped(runner, TASKS[2]), [*cases, *merged], TASKS, FLOORS, Tolerance()
        )
    assert [one.name for one in of_task] == [TASKS[2].name, STEPS]
    assert not any(TASK_IDS in one.inputs for one in of_task)


def ids_of(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the ids of a batch of the third task."""
    return {TASK_IDS: np.full(len(inputs["input_ids"]), 2)}
