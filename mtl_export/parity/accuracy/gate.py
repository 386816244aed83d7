"""The accuracy gate: does what ships still answer as well as the model it came from?

Both answer the same labelled rows. Their scores differ by ``drop``; a paired bootstrap
(Efron and Tibshirani 1993, chapter 8; rows, or whole queries, drawn with replacement, the
same ones for both) says how far the rows at hand leave it open. Where none of them, or hardly
any, is answered differently, drawing them again shows nothing, so the interval reaches at least
as far as ``unseen_share`` says:

    passed    even the upper end of the interval is at most the drop allowed
    failed    even the lower end is above it
    not-run   neither: these rows cannot tell, so noise neither fails nor passes a build

The worst task decides (``ParityReport.accuracy_verdict``). Only ``passed`` opens the gate.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CalibrationError
from mtl_export.parity.accuracy.scores import SCORES, Answers, Score
from mtl_export.parity.report import AccuracyCell, Verdict

RESAMPLES = 1000
CONFIDENCE = 0.95


def judge_accuracy(
    artefact: str,
    task: str,
    score: str,
    reference: Answers,
    candidate: Array,
    *,
    max_drop: float,
    seed: int = 0,
) -> AccuracyCell:
    """Return the verdict on one artefact and task.

    Args:
        artefact: Its name.
        task: The task's name.
        score: A key of ``SCORES``.
        reference: The reference's answers and the truth, at least one row.
        candidate: The artefact's logits, float64 ``[N, L]``.
        max_drop: Largest drop allowed, in the score's own unit (0.01 is one point).
        seed: Of the drawing.

    Raises:
        CalibrationError: The score is not defined on these rows.
    """
    own = Answers(candidate, reference.labels, reference.queries)
    before, after = SCORES[score](reference), SCORES[score](own)
    if np.isnan(before):
        raise CalibrationError(
            f"task {task}, {len(candidate)} rows: {score} is not defined on them",
            expected=(
                "rows of more than one label, or values that differ, because nothing could be "
                "compared"
            ),
            fix="Give more rows of this task, or another --score",
        )
    if not np.isfinite(candidate).all() or np.isnan(after):
        return AccuracyCell(artefact, task, score, len(candidate), before, None, None, None,
                            max_drop, "failed",
                            "answers that are NaN or Inf, or all the same")  # fmt: skip
    low, high = paired_bootstrap(SCORES[score], reference, own, seed=seed)
    drop, unseen = before - after, unseen_share(reference)
    half = (high - low) / 2
    low, high = min(low, drop - unseen), max(high, drop + unseen)
    verdict, reason = _verdict(drop, low, high, max_drop)
    if verdict == "not-run":
        reason = (
            f"these {len(candidate)} rows cannot tell: {reason}"
            f"; {_advice(abs(max_drop - drop), half, max_drop, len(candidate))}"
        )
    return AccuracyCell(artefact, task, score, len(candidate), before, after, low, high,
                        max_drop, verdict, reason)  # fmt: skip


def paired_bootstrap(
    score: Score, reference: Answers, candidate: Answers, *, seed: int
) -> tuple[float, float]:
    """Return the interval of ``score(reference) - score(candidate)``.

    Args:
        score: The score.
        reference: N rows.
        candidate: The same rows.
        seed: Of the drawing.

    Returns:
        The two percentiles that hold ``CONFIDENCE`` of ``RESAMPLES`` drawings between them.
        Drawings on which the score is not defined are left out.
    """
    generator = np.random.default_rng(seed)
    drops = []
    for _ in range(RESAMPLES):
        places, queries = _drawn(reference, generator)
        left, right = reference.rows(places), candidate.rows(places)
        drops.append(score(replace(left, queries=queries)) - score(replace(right, queries=queries)))
    kept = np.array(drops)[~np.isnan(drops)]
    if not kept.size:
        return float("-inf"), float("inf")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)


def unseen_share(answers: Answers) -> float:
    """Return how large a share may be answered differently though no row at hand is.

    The exact upper limit, with ``CONFIDENCE``, of a share of which N drawings show none:
    (1 - share)^N = 1 - CONFIDENCE, so about 3 / N, the rule of three (Hanley and Lippman-Hand
    1983). N counts what is drawn: rows, or queries. 299 of them show that less than a point is
    lost, 598 half a point.
    """
    drawn = len(answers.logits) if answers.queries is None else len(np.unique(answers.queries))
    return float(1 - (1 - CONFIDENCE) ** (1 / drawn))


def _verdict(drop: float, low: float, high: float, allowed: float) -> tuple[Verdict, str]:
    if high <= allowed:
        return "passed", ""
    if low > allowed:
        return "failed", f"drops by {drop:.4f}, at least {low:.4f}; allowed is {allowed:g}"
    return "not-run", (
        f"the drop is {drop:.4f}, but {low:.4f} to {high:.4f} with {CONFIDENCE:.0%} confidence,"
        f" allowed is {allowed:g}"
    )


def _advice(apart: float, half: float, allowed: float, rows: int) -> str:
    """Return what would tell.

    Args:
        apart: How far the drop is from what is allowed.
        half: Half the width of the bootstrap's interval.
        allowed: The drop allowed.
        rows: How many there are.
    """
    if not allowed:
        return "no number of rows shows that nothing is ever lost, so allow more than 0"
    if not apart or not np.isfinite(half):
        return "give more rows"
    # What no row shows shrinks with the rows, the width of a bootstrap with their square root.
    needed = max(-np.log(1 - CONFIDENCE) / apart, rows * (half / apart) ** 2)
    return f"give about {float(f'{needed:.1g}'):g} rows"


def _drawn(answers: Answers, generator: np.random.Generator) -> tuple[Array, Array | None]:
    """Return places of rows, or of whole queries, drawn with replacement, and their queries.

    A query that is drawn twice counts as two.
    """
    if answers.queries is None:
        count = len(answers.logits)
        return generator.integers(0, count, count), None
    groups = [np.flatnonzero(answers.queries == query) for query in np.unique(answers.queries)]
    drawn = [groups[n] for n in generator.integers(0, len(groups), len(groups))]
    return np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(one) for one in drawn])
