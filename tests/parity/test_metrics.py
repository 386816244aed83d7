from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import TaskKind
from mtl_export.parity.metrics import (
    BEST_DB,
    Decisions,
    decisions,
    difference,
    ranking,
    sqnr_db,
    top_labels,
)

REFERENCE = np.array([[1.0, -2.0, 0.5], [3.0, 3.5, -1.0]])


def test_the_worst_element_is_named() -> None:
    """Largest absolute error, its place, and by how much it exceeds what was allowed."""
    candidate = REFERENCE + np.array([[0.0, 0.25, 0.0], [0.0, 0.0, -0.5]])
    found = difference(REFERENCE, candidate, np.full((2, 3), 0.125))
    assert (found.max_abs, found.index, found.excess) == (0.5, (1, 2), 0.375)


def test_the_excess_is_taken_where_it_is_largest() -> None:
    """A small error over a small allowance outweighs a large error within a large one."""
    candidate = REFERENCE + np.array([[0.25, 0.0, 0.0], [0.0, 0.5, 0.0]])
    allowed = np.array([[0.125, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = difference(REFERENCE, candidate, allowed)
    assert (found.max_abs, found.index, found.excess) == (0.5, (1, 1), 0.125)


def test_equal_arrays_differ_by_nothing() -> None:
    """No error leaves the whole allowance."""
    found = difference(REFERENCE, REFERENCE.copy(), np.full((2, 3), 0.125))
    assert (found.max_abs, found.excess) == (0.0, -0.125)


def test_nothing_compared_is_nothing_found() -> None:
    """An empty comparison has no worst element."""
    empty = np.zeros((0, 3))
    assert difference(empty, empty, empty).index == ()


@pytest.mark.parametrize(
    ("kind", "reference", "candidate", "limit", "expected"),
    [
        # Four rows: same, same, changed with margin 1.0, changed with margin 0.125.
        (
            "single_label_classification",
            [[2.0, 1.0], [0.0, 5.0], [1.0, 0.0], [0.5, 0.375]],
            [[1.9, 1.0], [0.0, 4.0], [0.0, 1.0], [0.375, 0.5]],
            0.0625,
            Decisions(total=4, equal=2, ties=1),
        ),
        # The margin of a tie is at most twice the limit.
        (
            "single_label_classification",
            [[0.5, 0.25], [0.5, 0.0]],
            [[0.25, 0.5], [0.0, 0.5]],
            0.125,
            Decisions(total=2, equal=0, ties=1),
        ),
        # One logit decides nothing by argmax.
        ("single_label_classification", [[2.0]], [[-2.0]], 0.1, Decisions(0, 0, 0)),
        # Six signs: four same, one changed at -1, one changed within the limit of 0.
        (
            "multi_label_classification",
            [[1.0, -1.0, 0.125], [2.0, -2.0, 3.0]],
            [[1.0, 1.0, -0.125], [2.0, -2.0, 3.0]],
            0.125,
            Decisions(total=6, equal=4, ties=1),
        ),
        ("regression", [[1.0], [2.0]], [[-9.0], [9.0]], 0.1, Decisions(0, 0, 0)),
        # A language model decides on the next token.
        ("headless", [[1.0, 2.0], [3.0, 0.0]], [[2.0, 1.0], [3.0, 0.0]], 0.1, Decisions(2, 1, 0)),
    ],
)
def test_decisions_are_counted_by_the_tasks_kind(
    kind: TaskKind,
    reference: list[list[float]],
    candidate: list[list[float]],
    limit: float,
    expected: Decisions,
) -> None:
    """Argmax, sign or nothing decides; a near tie in the reference is told apart."""
    found = decisions(np.array(reference), np.array(candidate), kind, limit)
    assert found == expected
    assert found.changed == expected.total - expected.equal - expected.ties


def test_sqnr_counts_energies_in_decibels() -> None:
    """Noise of a hundredth of the signal's energy is 20 dB; none, or only noise, has its limit."""
    signal = np.array([[3.0, 4.0]])
    assert sqnr_db(signal, signal + np.array([[0.3, 0.4]])) == pytest.approx(20.0)
    assert sqnr_db(signal, signal) == BEST_DB
    assert sqnr_db(0 * signal, signal) == -BEST_DB
    assert sqnr_db(signal, signal * np.nan) == -BEST_DB


@pytest.mark.parametrize(
    ("candidate", "limit", "expected"),
    [
        ([[1.0], [2.0], [2.25]], 0.1, Decisions(3, 3, 0)),
        # The two that are 0.25 apart change places: a tie if each may be off by 0.125.
        ([[1.0], [2.3], [2.2]], 0.125, Decisions(3, 2, 1)),
        ([[1.0], [2.3], [2.2]], 0.1, Decisions(3, 2, 0)),
        # All in the other order, and all alike.
        ([[3.0], [2.0], [1.0]], 0.0, Decisions(3, 0, 0)),
        ([[1.0], [1.0], [1.0]], 0.125, Decisions(3, 0, 1)),
    ],
)
def test_a_regression_decides_an_order(
    candidate: list[list[float]], limit: float, expected: Decisions
) -> None:
    """Every pair of rows counts once; near pairs may change places."""
    reference = np.array([[1.0], [2.0], [2.25]])
    assert ranking(reference, np.array(candidate), limit) == expected
    assert ranking(reference[:1], reference[:1], limit) == Decisions(0, 0, 0)


@pytest.mark.parametrize(
    ("candidate", "limit", "expected"),
    [
        ([[5.0, 4.0, 3.0, 2.75]], 0.0, Decisions(1, 1, 0)),
        ([[4.0, 5.0, 3.0, 2.75]], 0.0, Decisions(1, 1, 0)),
        # The third and the fourth are 0.25 apart.
        ([[5.0, 4.0, 2.0, 3.0]], 0.125, Decisions(1, 0, 1)),
        ([[5.0, 4.0, 2.0, 3.0]], 0.1, Decisions(1, 0, 0)),
        ([[0.0, 4.0, 3.0, 3.5]], 0.125, Decisions(1, 0, 0)),
    ],
)
def test_the_largest_few_are_compared_as_a_set(
    candidate: list[list[float]], limit: float, expected: Decisions
) -> None:
    """Their order does not matter; which they are does, beyond a tie."""
    reference = np.array([[5.0, 4.0, 3.0, 2.75]])
    assert top_labels(reference, np.array(candidate), 3, limit) == expected
    assert Decisions(2, 1, 1) + Decisions(3, 3, 0) == Decisions(5, 4, 1)
