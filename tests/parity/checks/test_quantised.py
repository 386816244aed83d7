"""Quantised artefacts: what their noise may be, and what it never excuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.artefact import Artefact, Quantised
from mtl_export.parity.cases import Case
from mtl_export.parity.checks.quantised import PLAIN, QUANTISED, RECORDED
from mtl_export.parity.report import RecordedTask
from tests.parity.fakes import TASKS, Answer, exact, failed, judge, merged, right_for, single

NOISE = 0.3  # far beyond 8 noise floors of 1e-6; of logits of size 3


def noisy(scale: float) -> Answer:
    """Return a single graph whose error depends on the row alone, as rounding's does."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        content = (inputs["input_ids"] * inputs["attention_mask"]).sum(axis=1)
        return {"logits": exact(inputs) + scale * np.cos(content)[:, None]}

    return answer


def record(drop: float, task: str, allowed: float = 1.0) -> RecordedTask:
    """Return what calibrate counted."""
    return RecordedTask("single graph", task, 100, 100, drop, {"fp32": 0.9}, {"int8": 20.0}, {},
                        allowed, "by --max-drop")  # fmt: skip


def quantised(bound: BoundModel, answer: Answer, **drops: float) -> Artefact:
    """Return an int8 single graph that answers so; by default no task lost anything."""
    recorded = {task.name: record(drops.get(task.name, 0.0), task.name) for task in TASKS}
    return replace(single(bound, answer), quantised=Quantised("int8", recorded=recorded))


def test_noise_that_fails_a_float_graph_passes(bound: BoundModel, cases: list[Case]) -> None:
    """Its SQNR and its decisions are told for every task; a float graph may not have them."""
    assert failed(judge(bound, cases, single(bound, noisy(NOISE))))
    report = judge(bound, cases, quantised(bound, noisy(NOISE)))
    assert report.verdict == "passed"
    assert not failed(report)
    cells = {cell.task: cell for cell in report.cells if cell.case == QUANTISED}
    assert list(cells) == [task.name for task in TASKS]
    assert all(10.0 < (cell.sqnr_db or 0.0) < 30.0 for cell in cells.values())
    total, equal, _ = cells["b"].decisions or (0, 0, 0)
    assert 0.5 * total < equal <= total
    assert [one.task for one in report.quantised] == [task.name for task in TASKS]


def test_one_task_that_drowns_in_noise_fails_alone(bound: BoundModel, cases: list[Case]) -> None:
    """As it does where the ranges are another task's."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = noisy(NOISE)(inputs)["logits"]
        loud = inputs["task_ids"] == 1
        # Cut where the other tasks' logits end.
        return {"logits": np.where(loud[:, None], np.clip(logits, -np.inf, -1.0), logits)}

    report = judge(bound, cases, quantised(bound, answer))
    assert {(cell.task, cell.case) for cell in failed(report)} == {("b", QUANTISED)}
    assert "10 are needed" in failed(report)[0].reason


def test_a_task_that_lost_too_much_on_labelled_rows_fails(
    bound: BoundModel, cases: list[Case]
) -> None:
    """What calibrate counted is held to what is allowed, and the reason says by whom."""
    report = judge(bound, cases, quantised(bound, noisy(NOISE), c=1.5))
    assert [(cell.task, cell.case) for cell in failed(report)] == [("c", RECORDED)]
    assert (
        "lost 1.50 points of accuracy on 100 rows; allowed is 1 by --max-drop"
        in failed(report)[0].reason
    )
    artefact = quantised(bound, noisy(NOISE))
    wider = replace(Quantised("int8"), recorded={t.name: record(1.5, t.name, 2.0) for t in TASKS})
    assert not failed(judge(bound, cases, replace(artefact, quantised=wider)))
    artefact = quantised(bound, noisy(NOISE), c=float("nan"))
    assert [cell.task for cell in failed(judge(bound, cases, artefact))] == ["c"]


def test_without_a_report_nothing_is_claimed(bound: BoundModel, cases: list[Case]) -> None:
    """Accuracy that nobody counted is not-run, not passed."""
    artefact = replace(single(bound, noisy(NOISE)), quantised=Quantised("int8"))
    report = judge(bound, cases, artefact)
    assert {c.verdict for c in report.cells if c.case == RECORDED} == {"not-run"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", "values are NaN or Inf"),
        ("narrow", "has shape"),
        ("answers for absent labels", "columns 2 and up answer"),
        ("answers bad ids", "are answered"),
        ("tasks swapped", "are needed"),
        ("first id for all", "are needed"),
    ],
)
def test_no_noise_excuses(fault: str, reason: str, bound: BoundModel, cases: list[Case]) -> None:
    """What a graph must be whatever its numbers are, a quantised one must be too."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        ids = np.asarray(inputs["task_ids"])
        known = {
            "tasks swapped": (ids + 1) % 3,
            "first id for all": np.resize(ids[:1], len(ids)),
            "answers bad ids": np.clip(ids, 0, 2),
        }.get(fault, ids)
        logits = noisy(NOISE)({**inputs, "task_ids": known})["logits"]
        if fault in {"tasks swapped", "first id for all"}:
            # Each task has its own labels all the same.
            own = np.isneginf(exact(inputs))
            logits = np.where(own, -np.inf, np.nan_to_num(logits, neginf=0.0))
            logits = np.where(np.isnan(exact(inputs)), np.nan, logits)
        if fault == "nan":
            logits[:, 0] = np.nan
        if fault == "answers for absent labels":
            logits = np.where(np.isneginf(logits), 0.0, logits)
        return {"logits": logits[:, :-1] if fault == "narrow" else logits}

    found = failed(judge(bound, cases, quantised(bound, answer)))
    assert any(reason in cell.reason for cell in found)


def test_a_row_that_its_neighbours_change_fails(bound: BoundModel, cases: list[Case]) -> None:
    """A graph that rounds by the batch's own range lets rows see each other."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = noisy(NOISE)(inputs)["logits"]
        return {"logits": logits + 0.01 * float(np.sum(inputs["task_ids"] == 0))}

    cases_failed = {cell.case for cell in failed(judge(bound, cases, quantised(bound, answer)))}
    assert "neighbours change task" in cases_failed


def test_merged_ones_are_judged_on_their_own_rows(bound: BoundModel, cases: list[Case]) -> None:
    """One task, no task_ids, and a cell for its noise."""
    recorded = {"a": record(0.0, "a")}
    artefact = replace(merged(bound, 0, right_for(0)), quantised=Quantised("int8", None, recorded))
    report = judge(bound, cases, artefact)
    assert not failed(report)
    assert [cell.task for cell in report.cells if cell.case == QUANTISED] == ["a"]


def test_without_its_float_graph_half_the_proof_is_missing(
    bound: BoundModel, cases: list[Case], tmp_path: object
) -> None:
    """The graph without Q/DQ cannot be looked at, which is said."""
    from pathlib import Path

    artefact = replace(quantised(bound, noisy(NOISE)), path=Path("nowhere/other.onnx"))
    (cell,) = (c for c in judge(bound, cases, artefact).cells if c.case == PLAIN)
    assert cell.verdict == "not-run"
    assert "mtl-export onnx" in cell.reason
