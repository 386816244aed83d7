from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mtl_export.parity.report import SCHEMA, Cell, ParityReport, Verdict, worst
from mtl_export.parity.reports import facts


def cell(verdict: Verdict, error: float | None = None, limit: float | None = None) -> Cell:
    """Return a cell with this verdict and share of its limit."""
    reason = "" if verdict == "passed" else "because"
    return Cell("a", "r", "t", "c", verdict, reason, max_abs_error=error, limit=limit)


def report(*verdicts: Verdict) -> ParityReport:
    """Return a report of cells with these verdicts."""
    return ParityReport(
        cells=tuple(cell(verdict) for verdict in verdicts), tolerance="rule",
        noise_floors={"fp32": {"t": 1e-7}}, sources={"base_sha256": "b"}, versions={"torch": "2"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((), "not-run"),
        (("not-run",), "not-run"),
        (("passed",), "passed"),
        (("passed", "not-run"), "passed"),
        (("passed", "failed", "not-run"), "failed"),
        (("failed",), "failed"),
        (("not-run", "failed"), "failed"),
    ],
)
def test_one_failure_fails_and_nothing_run_is_no_pass(
    verdicts: tuple[Verdict, ...], expected: Verdict
) -> None:
    """Failed outweighs passed, and what did not run passes nothing."""
    assert report(*verdicts).verdict == expected


def test_files_alone_pass_nothing() -> None:
    """An artefact whose runtime is missing is not-run, however right its tokenizer is."""
    whole = Cell("graph", "onnxruntime", "*", "*", "not-run", "onnxruntime is not installed")
    beside = Cell("graph", "onnxruntime", "*", "tokenizer", "passed")
    other = Cell("merged", "pytorch", "*", "mixed tasks", "passed")
    made = report("passed")
    assert replace(made, cells=(beside, whole)).verdict == "not-run"
    assert replace(made, cells=(beside, whole, other)).verdict == "passed"
    assert replace(made, cells=(beside,)).verdict == "passed"


def test_the_three_words_are_counted_apart() -> None:
    """A check that could not run is never counted as passed."""
    found = report("passed", "not-run", "failed", "passed", "not-run", "not-run")
    assert [found.count(v) for v in ("passed", "failed", "not-run")] == [2, 1, 3]
    assert found.as_dict()["counts"] == {"passed": 2, "failed": 1, "not-run": 3}


def test_the_report_is_json() -> None:
    """Everything survives a round trip through JSON, under a schema that says its version."""
    made = report("passed", "failed")
    found = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert found == made.as_dict() | {"cells": found["cells"]}
    assert found["schema"] == SCHEMA
    assert found["verdict"] == "failed"
    assert found["noise_floors"] == {"fp32": {"t": 1e-7}}
    assert [entry["verdict"] for entry in found["cells"]] == ["passed", "failed"]
    assert set(found["cells"][0]) == {
        "artefact", "runtime", "task", "case", "verdict", "reason", "max_abs_error",
        "noise_floor", "limit", "decisions", "output", "least_atol", "sqnr_db",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # A failure speaks before the largest passing error.
        ([cell("passed", 9.0, 10.0), cell("failed", 0.1, 10.0)], 1),
        # A failure without numbers speaks before any pass, and after a failure with numbers.
        ([cell("passed", 9.0, 10.0), cell("failed")], 1),
        ([cell("failed"), cell("failed", 30.0, 10.0), cell("failed", 20.0, 10.0)], 1),
        # Among passes the largest share of the limit, not the largest error.
        ([cell("passed", 5.0, 100.0), cell("passed", 2.0, 4.0)], 1),
        # What did not run speaks only when nothing ran.
        ([cell("not-run"), cell("passed", 0.0, 1.0)], 1),
        ([cell("not-run")], 0),
        # A limit of zero is no division by zero.
        ([cell("passed", 0.0, 0.0), cell("passed", 1.0, 2.0)], 1),
    ],
)
def test_the_worst_cell_speaks_for_all(cells: list[Cell], expected: int) -> None:
    """Failed before passed before not-run; within one verdict the largest share."""
    assert worst(cells) is cells[expected]


def test_files_alone_speak_for_no_artefact() -> None:
    """Of one that could not be run they tell what is wrong, never that it passed."""
    whole = Cell("graph", "onnxruntime", "*", "*", "not-run", "onnxruntime is not installed")
    beside = Cell("graph", "onnxruntime", "*", "tokenizer", "passed")
    wrong = replace(beside, verdict="failed", reason="another tokenizer")
    assert worst([beside, whole]) is whole
    assert worst([whole, wrong, beside]) is wrong
    assert facts.matrix(replace(report("passed"), cells=(beside, whole)))["t"]["graph"] is whole


def test_the_noise_of_a_quantised_artefact_speaks_for_it_unless_it_failed() -> None:
    """Not the error of its graph without Q/DQ, which says little of what ships."""
    noise = Cell("single-graph int8", "onnxruntime", "a", "quantised", "passed", sqnr_db=19.5)
    plain = replace(noise, case="without Q/DQ", sqnr_db=None, max_abs_error=1e-6, limit=2e-6)
    assert worst([plain, noise]) == noise
    assert facts.measured(noise) == "19.5 dB"
    assert facts.measured(plain) == "1.0e-06"
    failed = replace(plain, verdict="failed", reason="another model")
    assert worst([noise, failed]) == failed
