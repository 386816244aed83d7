from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CalibrationError
from mtl_export.parity.accuracy.gate import judge_accuracy, paired_bootstrap
from mtl_export.parity.accuracy.scores import Answers, accuracy, ndcg
from mtl_export.parity.report import AccuracyCell, Cell, ParityReport, Verdict, worst_by_artefact


def one_hot(decided: Array, width: int = 3) -> Array:
    """Return logits that decide so."""
    return np.eye(width)[decided]


def case(rows: int, wrong_before: int, newly_wrong: int, newly_right: int) -> tuple[Answers, Array]:
    """Return a reference with some wrong rows, and a candidate that changes some."""
    labels = np.arange(rows) % 3
    before = labels.copy()
    before[:wrong_before] = (labels[:wrong_before] + 1) % 3
    after = before.copy()
    after[:newly_right] = labels[:newly_right]
    after[rows - newly_wrong :] = (labels[rows - newly_wrong :] + 1) % 3
    return Answers(one_hot(before), labels), one_hot(after)


def judged(reference: Answers, candidate: Array, max_drop: float = 0.01) -> AccuracyCell:
    """Return the verdict by accuracy."""
    return judge_accuracy("int8", "spam", "accuracy", reference, candidate, max_drop=max_drop)


@pytest.mark.parametrize(
    ("rows", "max_drop", "verdict"),
    [
        (1, 0.01, "not-run"), (5, 0.01, "not-run"), (298, 0.01, "not-run"),
        (299, 0.01, "passed"), (810, 0.005, "passed"), (3000, 0.0, "not-run"),
    ],
)  # fmt: skip
def test_equal_answers_pass_by_their_number(rows: int, max_drop: float, verdict: Verdict) -> None:
    """Rows that all agree show only that what they do not show is rare: 3 in as many rows."""
    cell = judged(*case(rows, wrong_before=rows // 5, newly_wrong=0, newly_right=0), max_drop)
    assert (cell.verdict, cell.drop) == (verdict, 0.0)
    assert cell.is_undecided is (verdict == "not-run")
    assert cell.high == pytest.approx(3 / rows, rel=0.1) or rows < 20
    assert cell.low is not None
    assert cell.low + (cell.high or 0.0) == 0.0
    advice = "give about 300 rows" if max_drop else "allow more than 0"
    assert advice in cell.reason or verdict == "passed"


def test_one_row_of_many_that_differs_stays_within_a_point() -> None:
    """Neither does a row won, which a bootstrap counts as if no other could be lost."""
    assert judged(*case(810, 40, newly_wrong=1, newly_right=0), max_drop=0.005).verdict == "passed"
    assert judged(*case(810, 40, newly_wrong=0, newly_right=1), max_drop=0.005).verdict == "passed"
    assert judged(*case(20, 4, newly_wrong=0, newly_right=1)).verdict == "not-run"


def test_a_drop_beyond_doubt_fails() -> None:
    """Eight points on 1000 rows are no noise."""
    cell = judged(*case(rows=1000, wrong_before=50, newly_wrong=80, newly_right=0))
    assert cell.verdict == "failed"
    assert cell.drop == pytest.approx(0.08)
    assert cell.low is not None
    assert cell.high is not None
    assert 0.01 < cell.low < 0.08 < cell.high
    assert "0.0800" in cell.reason


def test_few_rows_can_neither_pass_nor_fail() -> None:
    """One row of twenty is five points, or nothing at all."""
    cell = judged(*case(rows=20, wrong_before=2, newly_wrong=1, newly_right=0))
    assert cell.verdict == "not-run"
    assert cell.is_undecided
    # Five points are four from the limit, and 3 of 70 rows are four points.
    assert "give about 70 rows" in cell.reason


def test_small_drops_on_many_rows_pass() -> None:
    """Six rows of 3000 lost and four won are within a point, without doubt."""
    cell = judged(*case(rows=3000, wrong_before=100, newly_wrong=6, newly_right=4))
    assert cell.verdict == "passed"
    assert cell.drop == pytest.approx(2 / 3000)
    assert cell.low is not None
    assert cell.high is not None
    assert cell.drop is not None
    assert cell.low < cell.drop < cell.high < 0.01


def test_the_interval_is_as_wide_as_theory_says() -> None:
    """Of n paired rows the drop's standard error is sqrt(var(differences) / n)."""
    reference, candidate = case(rows=800, wrong_before=40, newly_wrong=40, newly_right=20)
    own = Answers(candidate, reference.labels)
    low, high = paired_bootstrap(accuracy, reference, own, seed=3)
    right = reference.logits.argmax(1) == reference.labels
    difference = right.astype(float) - (candidate.argmax(1) == reference.labels)
    expected = 2 * 1.96 * np.sqrt(difference.var() / 800)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_answers_that_are_nan_fail() -> None:
    """A NaN has no largest logit."""
    reference, candidate = case(rows=30, wrong_before=0, newly_wrong=0, newly_right=0)
    candidate[4, 1] = np.nan
    cell = judged(reference, candidate, max_drop=1.0)
    assert cell.verdict == "failed"
    assert "NaN" in cell.reason


def test_rows_without_a_score_are_refused() -> None:
    """An area needs rows of both labels."""
    answers = Answers(np.ones((4, 2)), np.zeros(4, np.int64))
    with pytest.raises(CalibrationError, match="auc is not defined"):
        judge_accuracy("int8", "spam", "auc", answers, np.ones((4, 2)), max_drop=0.1)


def test_queries_are_drawn_whole() -> None:
    """One query alone has an interval of no width, however many rows it ranks."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 40)
    reference = Answers(labels[:, None] + 0.0, labels, np.zeros(40, np.int64))
    candidate = Answers(generator.normal(size=(40, 1)), labels, reference.queries)
    low, high = paired_bootstrap(ndcg, reference, candidate, seed=0)
    assert low == pytest.approx(high)
    assert low == pytest.approx(ndcg(reference) - ndcg(candidate))


def gate(*cells: AccuracyCell) -> Verdict:
    """Return the verdict of a report that has these."""
    return ParityReport((), "", {}, {}, {}, accuracy=cells).accuracy_verdict


def test_only_passed_opens_the_gate() -> None:
    """One undecided task keeps it shut; one that could not run does not; the worst speaks."""
    passed = judged(*case(rows=3000, wrong_before=100, newly_wrong=0, newly_right=0))
    unsure = judged(*case(rows=20, wrong_before=2, newly_wrong=1, newly_right=0))
    failed = judged(*case(rows=1000, wrong_before=50, newly_wrong=80, newly_right=0))
    absent = AccuracyCell("engine", "spam", "accuracy", 9, None, None, None, None, 0.01, "not-run")
    assert gate(passed) == "passed"
    assert gate(passed, unsure) == "not-run"
    assert gate(passed, unsure, failed) == "failed"
    assert gate(passed, absent) == "passed"
    assert gate(absent) == "not-run"
    assert gate() == "not-run"
    assert worst_by_artefact([passed, failed, unsure])["int8"] is failed


def test_both_gates_must_open() -> None:
    """Numbers that pass do not outweigh a score that drops, nor rows that cannot tell."""
    passed = judged(*case(rows=3000, wrong_before=100, newly_wrong=0, newly_right=0))
    unsure = judged(*case(rows=20, wrong_before=2, newly_wrong=1, newly_right=0))
    failed = judged(*case(rows=1000, wrong_before=50, newly_wrong=80, newly_right=0))
    right = Cell("int8", "fake", "spam", "mixed tasks", "passed")
    report = ParityReport((right,), "", {}, {}, {})
    assert report.verdict == "passed"
    for cell, verdict in ((passed, "passed"), (unsure, "not-run"), (failed, "failed")):
        assert replace(report, accuracy=(cell,)).verdict == verdict
    wrong = replace(right, verdict="failed", reason="error")
    assert replace(report, cells=(wrong,), accuracy=(passed,)).verdict == "failed"
