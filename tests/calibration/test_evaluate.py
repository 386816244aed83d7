from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import Task, TaskKind
from mtl_export.parity.accuracy.scores import Answers
from mtl_export_calibration.evaluate import score

LABELS = np.array([0, 1, 1, 0, -1])
BEFORE = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [5.0, 0.0]], np.float32)


def task(kind: TaskKind = "single_label_classification") -> Task:
    """Return a task of two labels."""
    return Task("spam", 0, ("no", "yes"), kind)


def answered(logits: object, labels: object = LABELS) -> Answers:
    """Return logits as answers of one task."""
    return Answers(np.asarray(logits, np.float64), np.asarray(labels))


def test_accuracy_is_counted_on_labelled_rows() -> None:
    """Of four labelled rows three are right before, two after: 25 points lost."""
    after = BEFORE.copy()
    after[1] = [2.0, 1.0]
    found = score(answered(BEFORE), answered(after), task())
    assert (found.rows, found.labelled) == (5, 4)
    assert (found.float_accuracy, found.accuracy, found.drop) == (0.75, 0.5, 25.0)
    assert found.agreement == 0.8


def test_a_better_accuracy_is_a_negative_drop() -> None:
    """Quantising may help by chance; that is no loss."""
    after = BEFORE.copy()
    after[3] = [2.0, 1.0]
    assert score(answered(BEFORE), answered(after), task()).drop == -25.0


def test_without_labels_changed_decisions_count() -> None:
    """No loss of accuracy can be larger than the share of decisions that changed."""
    after = BEFORE.copy()
    after[1] = [2.0, 1.0]
    found = score(answered(BEFORE, [-1] * 5), answered(after, [-1] * 5), task())
    assert (found.labelled, found.accuracy) == (0, None)
    assert found.drop == pytest.approx(20.0)


def test_nan_loses_everything() -> None:
    """A graph that answers NaN never passes."""
    after = BEFORE.copy()
    after[0] = np.nan
    assert score(answered(BEFORE), answered(after), task()).drop == 100.0


def test_regression_loses_variance() -> None:
    """Half the spread is noise: the drop is its share of the variance."""
    after = BEFORE + np.array([1.0, -1.0], np.float32)
    found = score(answered(BEFORE), answered(after), task("regression"))
    total = ((BEFORE - BEFORE.mean(axis=0)) ** 2).sum()
    assert found.drop == pytest.approx(100.0 * 10.0 / total)
    assert score(answered(BEFORE), answered(BEFORE), task("regression")).drop == 0.0


def test_multi_label_decisions_are_signs() -> None:
    """Every label's sign is a decision; labels of one index say nothing here."""
    signs = BEFORE - 1.5
    after = signs.copy()
    after[0, 0] = -1.0
    found = score(answered(signs), answered(after), task("multi_label_classification"))
    assert found.accuracy is None
    assert found.drop == pytest.approx(10.0)


def test_columns_beyond_a_tasks_labels_do_not_count() -> None:
    """A task's logits are as many as its labels; the rest is minus infinity."""
    wide = answered(np.append(BEFORE, np.full((5, 1), -np.inf), axis=1))
    assert score(wide, wide, task()).drop == 0.0
