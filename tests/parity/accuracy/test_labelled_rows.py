"""Labelled rows through fakes: who is asked what, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, EngineRunError, ParityError
from mtl_export.parity.accuracy.labelled_rows import BATCH, LabelledRows, Truth, accuracy_cells
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.report import AccuracyCell
from tests.parity.fakes import (
    TASKS,
    Answer,
    FakeRunner,
    exact,
    merged,
    oracle,
    right,
    right_for,
    single,
)

ROWS = 480


@pytest.fixture(scope="module")
def rows() -> LabelledRows:
    """Return rows whose labels are what the oracle says; the third task is a regression."""
    generator = np.random.default_rng(0)
    mask = (np.arange(9) < generator.integers(2, 10, ROWS)[:, None]).astype(np.int64)
    inputs = {
        "input_ids": generator.integers(0, 31, (ROWS, 9)),
        "attention_mask": mask,
        "task_ids": np.arange(ROWS) % 3,
    }
    logits = exact(inputs)
    truths = {
        task.name: Truth("accuracy", logits[inputs["task_ids"] == task.index].argmax(axis=1))
        for task in TASKS[:2]
    }
    own = inputs["task_ids"] == 2
    truths[TASKS[2].name] = Truth("spearman", logits[own, 0] + generator.normal(0, 0.1, own.sum()))
    return LabelledRows(inputs, truths)


def judged(bound: BoundModel, rows: LabelledRows, *artefacts: Artefact) -> list[AccuracyCell]:
    """Return the cells under a limit of two points."""
    return list(accuracy_cells(bound, artefacts, rows, oracle=oracle, max_drop=0.02))


def test_right_artefacts_keep_every_score(bound: BoundModel, rows: LabelledRows) -> None:
    """One cell for each task served; rows are asked in small batches, cut to their length."""
    graph = single(bound, right)
    cells = judged(bound, rows, graph, merged(bound, 1, right_for(1)))
    assert [(cell.artefact, cell.task, cell.score) for cell in cells] == [
        ("single graph", "a", "accuracy"), ("single graph", "b", "accuracy"),
        ("single graph", "c", "spearman"), ("merged", "b", "accuracy"),
    ]  # fmt: skip
    assert {cell.verdict for cell in cells} == {"passed"}
    assert {cell.rows for cell in cells} == {ROWS // 3}
    assert [cell.reference for cell in cells[:2]] == [1.0, 1.0]
    assert isinstance(graph.runner, FakeRunner)
    shapes = [asked["input_ids"].shape for asked in graph.runner.asked]
    assert max(rows for rows, _ in shapes) == BATCH
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    assert shapes[0][1] < 9


def test_rows_come_back_in_their_order(bound: BoundModel, rows: LabelledRows) -> None:
    """Padding on the left is no reason to cut tokens off, nor are rows mixed up."""
    flipped = {name: value[:, ::-1] for name, value in rows.inputs.items() if value.ndim == 2}
    turned = replace(rows, inputs={**rows.inputs, **flipped})
    assert {cell.verdict for cell in judged(bound, turned, single(bound, right))} == {"passed"}


def test_a_task_that_answers_worse_fails_alone(bound: BoundModel, rows: LabelledRows) -> None:
    """Every fifth row of one task decided wrongly is no noise; its reason says by how much."""

    def worse(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        wrong = (inputs["task_ids"] == 1) & (inputs["input_ids"][:, 0] % 5 == 0)
        logits[wrong] = logits[wrong][:, ::-1]
        return {"logits": logits}

    by_task = {cell.task: cell for cell in judged(bound, rows, single(bound, worse))}
    assert [by_task[name].verdict for name in "abc"] == ["passed", "failed", "passed"]
    assert "at least" in by_task["b"].reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda inputs: {}, "no logits"),
        (lambda inputs: {"logits": right(inputs)["logits"][:-1]}, "no logits"),
        (lambda inputs: {"logits": right(inputs)["logits"][:, :1]}, "columns"),
        (lambda inputs: {"logits": right(inputs)["logits"] * np.nan}, "NaN"),
    ],
)
def test_answers_that_cannot_be_scored_fail(
    bound: BoundModel, rows: LabelledRows, answer: Answer, reason: str
) -> None:
    """A missing or misshapen output is no reason to leave a task out."""
    cells = judged(bound, rows, single(bound, answer))
    assert cells[0].verdict == "failed"
    assert reason in cells[0].reason
    assert len(cells) == 3


def test_what_cannot_be_asked_is_not_run(bound: BoundModel, rows: LabelledRows) -> None:
    """Wrong files and missing backends are not-run; a runtime that refuses has failed."""
    missing = BackendMissingError("tensorrt: no GPU", expected="one", fix="Get one")
    refused = EngineRunError("model.onnx: broken", expected="whole", fix="Export")
    graph = single(bound, right)
    for artefact, verdict, reason in (
        (replace(graph, defect="config.json has changed"), "not-run", "config.json"),
        (replace(graph, base_sha256="0" * 64), "not-run", "export it again"),
        (replace(graph, runner=FakeRunner(right, refuses=missing)), "not-run", "no GPU"),
        (replace(graph, runner=FakeRunner(right, refuses=refused)), "failed", "broken"),
    ):
        cells = judged(bound, rows, artefact)
        assert {cell.verdict for cell in cells} == {verdict}
        assert all(reason in cell.reason and cell.drop is None for cell in cells)
        assert not any(cell.is_undecided for cell in cells)


def test_an_oracle_without_answers_is_an_error(bound: BoundModel, rows: LabelledRows) -> None:
    """There is nothing to compare with."""
    silent, mute = FakeRunner(lambda i: {"logits": exact(i) * np.nan}), FakeRunner(lambda i: {})
    for runners in ({"fp64": silent}, {"fp64": mute}):
        with pytest.raises(ParityError, match="labelled rows"):
            accuracy_cells(bound, [], rows, max_drop=0.01, oracle=runners.__getitem__)
