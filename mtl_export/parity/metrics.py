"""Pure functions on two arrays: a reference and a candidate.

Both are float64 ``[B, L]``, B rows, L logits, unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.checkpoint import TaskKind
from mtl_export.checkpoint.tensors import Array

BEST_DB = 150.0  # float32's own noise; stands for "no difference"


@dataclass(frozen=True, slots=True)
class Difference:
    """The worst element.

    Attributes:
        max_abs: Largest absolute error.
        index: Where, as (row, logit).
        excess: Largest error beyond what was allowed there; <= 0 passes.
    """

    max_abs: float
    index: tuple[int, ...]
    excess: float


@dataclass(frozen=True, slots=True)
class Decisions:
    """Whether both sides decide the same.

    Attributes:
        total: Decisions compared.
        equal: Of these, equal.
        ties: Unequal ones so close in the reference that the allowed error explains them.
    """

    total: int
    equal: int
    ties: int

    @property
    def changed(self) -> int:
        """Return how many decisions differ beyond a tie."""
        return self.total - self.equal - self.ties

    def __add__(self, other: Decisions) -> Decisions:
        """Return both together."""
        return Decisions(self.total + other.total, self.equal + other.equal, self.ties + other.ties)


def difference(reference: Array, candidate: Array, allowed: Array) -> Difference:
    """Return the worst element of two arrays of one shape, all finite.

    Args:
        reference: The truth.
        candidate: What is judged.
        allowed: Largest error allowed, broadcast against both.
    """
    errors = np.abs(candidate - reference)
    if errors.size == 0:
        return Difference(0.0, (), -np.inf)
    worst = np.unravel_index(int(np.argmax(errors)), errors.shape)
    return Difference(
        float(errors[worst]), tuple(int(i) for i in worst), float((errors - allowed).max())
    )


def decisions(reference: Array, candidate: Array, kind: TaskKind, limit: float) -> Decisions:
    """Return how often ``candidate`` decides as ``reference`` does.

    Classification decides by the largest logit, and so does a language model (a headless
    task: the next token); multi-label by each logit's sign; regression not at all. A
    changed decision counts as a tie when the reference's margin is at most twice
    ``limit``: each side may be off by ``limit``.
    """
    rows = reference.shape[0]
    if kind == "multi_label_classification":
        same = (reference > 0) == (candidate > 0)
        close = np.abs(reference) <= limit
    elif kind in {"single_label_classification", "headless"} and reference.shape[1] > 1:
        same = reference.argmax(axis=1) == candidate.argmax(axis=1)
        # A vocabulary is wide: the two largest are found without sorting it.
        ordered = np.partition(reference, -2, axis=1)
        close = ordered[:, -1] - ordered[:, -2] <= 2 * limit
    else:
        return Decisions(0, 0, 0)
    ties = int((~same & close).sum())
    return Decisions(int(same.size) if same.ndim > 1 else rows, int(same.sum()), ties)


def ranking(reference: Array, candidate: Array, limit: float) -> Decisions:
    """Return how often ``candidate`` puts two rows in the order that ``reference`` does.

    That is what the number of a regression decides. A pair in another order is a tie when the
    reference's two values are at most twice ``limit`` apart: each may be off by ``limit``.
    """
    first, second = np.triu_indices(reference.shape[0], k=1)
    before, after = reference[first] - reference[second], candidate[first] - candidate[second]
    same = np.sign(before) == np.sign(after)
    ties = int((~same & (np.abs(before) <= 2 * limit)).sum())
    return Decisions(int(same.size), int(same.sum()), ties)


def top_labels(reference: Array, candidate: Array, count: int, limit: float) -> Decisions:
    """Return in how many rows the ``count`` largest are the same, in whatever order.

    Another choice is a tie when every label that is missing leads every one in its place by at
    most twice ``limit`` in the reference.
    """
    best = np.argpartition(reference, -count, axis=1)[:, -count:]
    found = np.argpartition(candidate, -count, axis=1)[:, -count:]
    changed = np.flatnonzero((np.sort(best, axis=1) != np.sort(found, axis=1)).any(axis=1))
    ties = 0
    for row in changed:
        missing = np.setdiff1d(best[row], found[row])
        instead = np.setdiff1d(found[row], best[row])
        lead = reference[row, missing].max() - reference[row, instead].min()
        ties += int(lead <= 2 * limit)
    return Decisions(len(best), len(best) - len(changed), ties)


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Return the signal-to-noise ratio of ``candidate``, at most ``BEST_DB``.

    10 log10( sum reference^2 / sum (reference - candidate)^2 ), arrays of any shape.
    """
    signal = float((reference.astype(np.float64) ** 2).sum())
    noise = float(((reference.astype(np.float64) - candidate) ** 2).sum())
    if noise == 0.0:
        return BEST_DB
    if not np.isfinite(noise) or signal == 0.0:
        return -BEST_DB
    return min(BEST_DB, 10.0 * float(np.log10(signal / noise)))
