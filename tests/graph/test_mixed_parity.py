"""Parity of graphs whose outputs are of several kinds: each task by its own, and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Self

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.lower import merged_graph
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graph
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case, RowLimits, build_cases, seeded_rows
from mtl_export.parity.golden import golden_vectors
from mtl_export.parity.report import ParityReport
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.factories import VOCABULARY
from tests.graph.mixed_heads import NAMES, OUTPUTS

Outputs = dict[str, Array]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Return the usual cases."""
    text = ("input_ids", "attention_mask", "token_type_ids")
    count = len(NAMES)
    rows = seeded_rows(RowLimits(count, VOCABULARY), text, per_task=2)
    return build_cases(rows, RowLimits(count, VOCABULARY, 12))


class Spoilt:
    """A runner whose outputs are changed in place."""

    def __init__(self, runner: Runner, change: Callable[[Outputs, Array], object]) -> None:
        self.name, self._runner, self._change = runner.name, runner, change

    def __enter__(self) -> Self:
        """Open the runner."""
        self._runner.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._runner.__exit__(None, None, None)

    def infer(self, inputs: Mapping[str, Array]) -> Outputs:
        """Return the changed outputs."""
        outputs = {name: value.copy() for name, value in self._runner.infer(inputs).items()}
        self._change(outputs, inputs["task_ids"])
        return outputs


def artefact(bound: BoundModel, runner: Runner, task: int | None = None) -> Artefact:
    """Return a graph of all tasks, or of one."""
    return Artefact(
        name="graph", kind="single-graph" if task is None else "merged", runner=runner,
        task=None if task is None else bound.adapters.tasks[task], dtype="fp32",
        checkpoint_sha256=bound.adapters.checkpoint_sha256, base_sha256=bound.base.sha256,
    )  # fmt: skip


def judged(bound: BoundModel, cases: list[Case], *artefacts: Artefact) -> ParityReport:
    """Return the report."""
    return run_parity(
        bound, artefacts, cases, tolerance=Tolerance(),
        oracle=lambda dtype: OracleRunner(bound, dtype),
    )  # fmt: skip


def test_right_graphs_pass(
    mixed_bound: BoundModel,
    mixed_trace: TracedModel,
    mixed_folder: Path,
    cases: list[Case],
    tmp_path: Path,
) -> None:
    """Each task is compared once a case, in its own output; what must hold is asked of each."""
    file = mixed_folder / "model.onnx"
    single = artefact(mixed_bound, OrtRunner(file, threads=1))
    artefacts = [replace(single, path=file)]
    for task in mixed_bound.adapters.tasks[2:4]:
        folder = tmp_path / task.name
        folder.mkdir()
        write_graph(merged_graph(mixed_trace, mixed_bound, task), mixed_bound, folder, task)
        runner = OrtRunner(folder / "model.onnx", threads=1)
        artefacts.append(artefact(mixed_bound, runner, task.index))
    report = judged(mixed_bound, cases, *artefacts)
    assert [c for c in report.cells if c.verdict != "passed"] == []
    places = [(c.artefact, c.runtime, c.task, c.case) for c in report.cells if c.task == "*"]
    assert len(places) == len(set(places))
    checks = {case for *_, case in places}
    for check in ("bad task ids", "neighbours change task", "every layer counts", "rows permuted"):
        assert {f"{check}, {output}" for output in OUTPUTS.values()} <= checks
    for name in NAMES:
        compared = [c.case for c in report.cells if c.task == name and c.decisions is not None]
        assert compared


def swapped(outputs: Outputs, _: Array) -> None:
    """Give one head's answers for the other's."""
    first, second = outputs["classification"], outputs["classification_2"]
    first[:, :2], outputs["classification_2"] = second, first[:, :2].copy()


def answering_twice(outputs: Outputs, task_ids: Array) -> None:
    """Let rows answer in an output that is not their task's."""
    outputs["regression"][task_ids == NAMES.index("entities")] = 0.0


def without_states(outputs: Outputs, _: Array) -> None:
    """Drop an output."""
    del outputs["last_hidden_state"]


def base_for_unknown(outputs: Outputs, task_ids: Array) -> None:
    """Answer to unknown ids with states."""
    unknown = (task_ids < 0) | (task_ids >= len(NAMES))
    outputs["last_hidden_state"][unknown] = 0.5


FAULTS: tuple[tuple[Callable[[Outputs, Array], object], str, set[str]], ...] = (
    (swapped, "", {"topic", "intent", "mood", "*"}),
    (answering_twice, "answers in regression too", {"entities"}),
    (without_states, "no output 'last_hidden_state'", {"states", "*"}),
    (base_for_unknown, "are answered", {"*"}),
)


def test_faults_are_found(mixed_bound: BoundModel, mixed_folder: Path, cases: list[Case]) -> None:
    """Answers in the wrong output, in two, in none, and for nobody."""
    runners = [OrtRunner(mixed_folder / "model.onnx", threads=1) for _ in FAULTS]
    artefacts = [
        replace(artefact(mixed_bound, Spoilt(runner, change)), name=change.__name__)
        for runner, (change, *_) in zip(runners, FAULTS, strict=True)
    ]
    cells = judged(mixed_bound, cases[-3:], *artefacts).cells
    for change, reason, tasks in FAULTS:
        own = [c for c in cells if c.artefact == change.__name__ and c.verdict == "failed"]
        assert own, change
        assert tasks - {"*"} <= {cell.task for cell in own} <= tasks, change
        assert any(reason in cell.reason for cell in own), change


def test_golden_vectors(mixed_bound: BoundModel, mixed_folder: Path, cases: list[Case]) -> None:
    """They hold all outputs, and what has no answer must have none again."""
    tasks = mixed_bound.adapters.tasks
    floors = dict.fromkeys(NAMES, 1e-5)
    with OrtRunner(mixed_folder / "model.onnx", threads=1) as runner:
        vectors = golden_vectors(artefact(mixed_bound, runner), cases, tasks, floors, Tolerance())
        for vector in vectors:
            assert set(vector.outputs) == set(OUTPUTS.values())
            again = runner.infer(vector.inputs)
            assert vector.difference(again) == ""
            again["regression"][...] = np.where(
                np.isneginf(again["regression"]), 0.0, again["regression"]
            )
            if vector.name != "score":
                assert "regression differ" in vector.difference(again)
