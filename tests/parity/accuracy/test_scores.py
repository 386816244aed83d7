"""Scores against definitions written out, row by row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.accuracy.scores import (
    SCORES,
    Answers,
    accuracy,
    auc,
    f1,
    ndcg,
    ranks,
    spearman,
    usual_score,
)


def pair_area(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return the chance that a positive row scores higher, from all pairs."""
    pairs = list(
        itertools.product(
            [s for s, p in zip(scores, positive, strict=True) if p],
            [s for s, p in zip(scores, positive, strict=True) if not p],
        )
    )
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def random_answers(seed: int, width: int, rows: int = 37) -> Answers:
    """Return answers with ties, every label present."""
    generator = np.random.default_rng(seed)
    logits = np.round(generator.normal(size=(rows, width)), 1)
    labels = np.concatenate([np.arange(width), generator.integers(0, width, rows - width)])
    return Answers(logits, labels)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_accuracy_counts_right_decisions(width: int) -> None:
    """One row at a time."""
    answers = random_answers(0, width)
    right = 0
    for row, label in zip(answers.logits, answers.labels, strict=True):
        best = sorted(range(width), key=lambda n, row=row: -row[n])[0]  # type: ignore[misc]
        right += int(best == label)
    assert accuracy(answers) == pytest.approx(right / 37)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_f1_is_the_mean_of_every_labels_own(width: int) -> None:
    """Precision and recall of each label, then their harmonic mean, then the mean."""
    answers = random_answers(1, width)
    found, labels = answers.logits.argmax(axis=1), answers.labels
    values = []
    for label in range(width):
        hits = int(((found == label) & (labels == label)).sum())
        precision = hits / max(1, int((found == label).sum()))
        recall = hits / max(1, int((labels == label).sum()))
        values.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert f1(answers) == pytest.approx(np.mean(values))


def test_a_label_that_nobody_names_does_not_count_for_f1() -> None:
    """As in scikit-learn: labels are those in the decisions or in the truth."""
    answers = Answers(np.array([[2.0, 0.0, -9.0], [0.0, 2.0, -9.0]]), np.array([0, 0]))
    assert f1(answers) == pytest.approx((2 / 3 + 0) / 2)


def test_the_area_is_that_of_all_pairs() -> None:
    """Two labels: by the lead of the second; ties count half."""
    answers = random_answers(2, 2)
    lead = answers.logits[:, 1] - answers.logits[:, 0]
    assert auc(answers) == pytest.approx(pair_area(lead.tolist(), (answers.labels == 1).tolist()))


def test_the_area_of_more_labels_is_one_against_the_rest() -> None:
    """By each label's share after softmax."""
    answers = random_answers(3, 4)
    shares = np.exp(answers.logits) / np.exp(answers.logits).sum(axis=1, keepdims=True)
    expected = np.mean(
        [pair_area(shares[:, n].tolist(), (answers.labels == n).tolist()) for n in range(4)]
    )
    assert auc(answers) == pytest.approx(expected)


def test_an_area_without_both_kinds_of_rows_is_nan() -> None:
    """Nothing can be ranked against nothing."""
    assert math.isnan(auc(Answers(np.ones((3, 2)), np.zeros(3, np.int64))))


def test_ndcg_of_a_ranking_worked_out_by_hand() -> None:
    """Two queries; the second has no relevant row and does not count."""
    logits = np.array([[3.0], [1.0], [2.0], [5.0], [4.0]])
    answers = Answers(logits, np.array([0, 2, 1, 0, 0]), np.array([7, 7, 7, 9, 9]))
    found = 0 / math.log2(2) + 1 / math.log2(3) + 3 / math.log2(4)
    best = 3 / math.log2(2) + 1 / math.log2(3) + 0
    assert ndcg(answers) == pytest.approx(found / best)


def test_ties_do_not_help_a_ranking() -> None:
    """A model that answers everything alike gets the worst order, not the file's."""
    tied = Answers(np.zeros((3, 1)), np.array([2, 1, 0]))
    backwards = Answers(np.array([[0.0], [1.0], [2.0]]), np.array([2, 1, 0]))
    assert ndcg(tied) == ndcg(backwards) < 1


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_ranks_share_ties(values: list[int]) -> None:
    """A value's rank is the mean place of its equals in order."""
    expected = [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]
    np.testing.assert_allclose(ranks(np.array(values, np.float64)), expected)


def test_spearman_is_pearson_of_ranks() -> None:
    """The plain correlation of the ranks; a constant answer has none."""
    generator = np.random.default_rng(5)
    logits: Array = np.round(generator.normal(size=(29, 1)), 1)
    labels = np.round(generator.normal(size=29), 1)
    expected = np.corrcoef(ranks(logits[:, 0]), ranks(labels))[0, 1]
    assert spearman(Answers(logits, labels)) == pytest.approx(expected)
    assert math.isnan(spearman(Answers(np.ones((4, 1)), np.arange(4.0))))


def test_multi_label_rows_are_judged_by_sign() -> None:
    """Every logit is a decision of its own."""
    logits = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -2.0]])
    labels = np.array([[True, False], [False, True], [False, True]])
    assert accuracy(Answers(logits, labels)) == pytest.approx(4 / 6)
    assert f1(Answers(logits, labels)) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert auc(Answers(logits, labels)) == pytest.approx((0.75 + 0.5) / 2)


def test_every_kind_has_a_usual_score() -> None:
    """Classification is judged by accuracy, ranks by rank correlation."""
    assert usual_score("regression") == "spearman"
    assert usual_score("single_label_classification") == "accuracy"
    assert usual_score("multi_label_classification") == "f1"
    assert set(SCORES) == {"accuracy", "f1", "auc", "ndcg", "spearman"}
