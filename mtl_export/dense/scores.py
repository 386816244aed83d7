"""How good maps are, given the right ones: one number a task, larger is better.

    miou     mean over the classes in the labels of intersection over union     (classes)
    maxf     largest F over 255 thresholds, beta^2 = 0.3, over all images       (sal)
    odsf     the same with beta = 1: one threshold for the dataset              (edge)
    angle    minus the root mean square of the angle between normals, degrees   (normals)
    rmse     minus the root mean square of the error                            (depth)

Shares are of 1; degrees and depths are divided by 100, so that 0.01 is one point of each. Pixels
that nobody has labelled do not count: 255 in class maps, 0 0 0 in normals, 0 in depths. Edges are
compared pixel by pixel, without the tolerance of BSDS's matching.

Each image brings sums, and a score is a function of their total: so images can be drawn again.

Source: evaluation/ of https://github.com/scale-lab/MTLoRA/tree/333a375; Achanta et al., CVPR 2009
(beta^2 = 0.3); Arbelaez et al., TPAMI 2011 (one threshold for the dataset).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.kinds import CLASSES, DIRECTIONS, PROBABILITY, VALUES, kind_of
from mtl_export.errors import CalibrationError
from mtl_export.parity.accuracy.gate import CONFIDENCE, RESAMPLES
from mtl_export.parity.report import AccuracyCell, Verdict

NOBODY_KNOWS = 255
THRESHOLDS = 255
# Pixels closer than this are no drawings of their own.
PATCH = 32


@dataclass(frozen=True)
class DenseScore:
    """A score.

    Attributes:
        name: As reports print it.
        sums: Raw values ``[n, H, H]`` and labels of one image -> what it adds.
        total: The sum over images -> the score.
    """

    name: str
    sums: Callable[[Array, Array], Array]
    total: Callable[[Array], float]


def _overlaps(raw: Array, labels: Array) -> Array:
    """Return ``[3, n]``: by class the intersection, the union, and the labels that have it."""
    known = labels != NOBODY_KNOWS
    found, right = raw.argmax(0)[known], labels[known]
    classes = np.arange(len(raw))[:, None]
    hits = ((found == classes) & (right == classes)).sum(1)
    either = ((found == classes) | (right == classes)).sum(1)
    present = (right == classes).sum(1)
    return np.stack([hits, either, present])


def _miou(total: Array) -> float:
    hits, either, present = total
    occurs = present > 0
    return float((hits[occurs] / either[occurs]).mean()) if occurs.any() else float("nan")


def _thresholds(raw: Array, labels: Array) -> Array:
    """Return ``[3, THRESHOLDS]``: hits, found and right pixels at each threshold."""
    known = labels != NOBODY_KNOWS
    level = np.clip(np.ceil(255 / (1 + np.exp(-raw[0][known]))), 0, THRESHOLDS).astype(np.int64)
    right = labels[known] > 0
    above = np.bincount(level, minlength=THRESHOLDS + 1)[::-1].cumsum()[::-1][1:]
    hits = np.bincount(level[right], minlength=THRESHOLDS + 1)[::-1].cumsum()[::-1][1:]
    return np.stack([hits, above, np.full(THRESHOLDS, right.sum())])


def _best_f(total: Array, squared: float) -> float:
    hits, found, right = total.astype(np.float64)
    if not right.any():
        return float("nan")
    precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    recall = hits / right
    below = squared * precision + recall
    f = np.divide((1 + squared) * precision * recall, below, out=np.zeros_like(hits),
                  where=below > 0)  # fmt: skip
    return float(f.max())


def _angles(raw: Array, labels: Array) -> Array:
    """Return the sum of squared angles in degrees, and the count of labelled pixels."""
    known = np.abs(labels).sum(-1) > 0
    right = labels[known].astype(np.float64)
    found = raw.transpose(1, 2, 0)[known]
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(right, axis=-1)
    cosine = (found * right).sum(-1) / np.maximum(lengths, 1e-12)
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return np.array([(degrees**2).sum(), known.sum()])


def _errors(raw: Array, labels: Array) -> Array:
    """Return the sum of squared errors, and the count of labelled pixels."""
    known = labels > 0
    return np.array([((raw[0] - labels)[known] ** 2).sum(), known.sum()])


def _minus_root_mean(total: Array) -> float:
    squares, count = total
    return -float((squares / count) ** 0.5) / 100 if count else float("nan")


MIOU = DenseScore("miou", _overlaps, _miou)
MAXF = DenseScore("maxf", _thresholds, lambda total: _best_f(total, 0.3))
ODSF = DenseScore("odsf", _thresholds, lambda total: _best_f(total, 1.0))
ANGLE = DenseScore("angle", _angles, _minus_root_mean)
RMSE = DenseScore("rmse", _errors, _minus_root_mean)
BY_KIND = {CLASSES: MIOU, PROBABILITY: MAXF, DIRECTIONS: ANGLE, VALUES: RMSE}


def score_of(task: str) -> DenseScore | None:
    """Return the usual score of a task; None where nobody says what it is of."""
    return ODSF if task == "edge" else BY_KIND.get(kind_of(task))


def refuse_misshaped(task: str, labels: Array, count: int, size: int) -> None:
    """Refuse labels that are not one map for each image.

    Raises:
        CalibrationError: They have another shape, or are no numbers.
    """
    shape: tuple[int, ...] = (count, size, size)
    shape = (*shape, 3) if kind_of(task) == DIRECTIONS else shape
    if labels.shape != shape or labels.dtype.kind not in "biuf":
        raise CalibrationError(
            f"--dataset, labels of {task}: {labels.dtype} {list(labels.shape)}",
            expected=f"numbers {list(shape)}, one map for each image",
            fix="Save them at the size of the model's images",
        )


def judge_scores(
    artefact: str, task: str, reference: Array, candidate: Array, *, size: int, max_drop: float
) -> AccuracyCell:
    """Return the verdict on one artefact's task; see ``parity.accuracy.gate`` for the rule.

    Args:
        artefact: Its name.
        task: The task's.
        reference: Sums of the unmerged model, image by image ``[N, ...]``.
        candidate: Sums of the artefact, likewise.
        size: Side of the images.
        max_drop: Largest drop allowed; 0.01 is one point.

    Raises:
        CalibrationError: The score is not defined on these images.
    """
    score = score_of(task)
    assert score is not None
    before, after = score.total(reference.sum(0)), score.total(candidate.sum(0))
    if np.isnan(before):
        raise CalibrationError(
            f"--dataset, task {task}: {score.name} is not defined on {len(reference)} images",
            expected="labelled pixels",
            fix="Give images with labels of this task",
        )
    draw = np.random.default_rng(0)
    drops = []
    for _ in range(RESAMPLES):
        places = draw.integers(0, len(reference), len(reference))
        drops.append(score.total(reference[places].sum(0)) - score.total(candidate[places].sum(0)))
    kept = np.array(drops)[~np.isnan(drops)]
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(one) for one in np.quantile(kept, [tail, 1 - tail]))
    patches = len(reference) * max(1, size // PATCH) ** 2
    drop, unseen = before - after, 1 - (1 - CONFIDENCE) ** (1 / patches)
    low, high = min(low, drop - unseen), max(high, drop + unseen)
    verdict: Verdict = "passed" if high <= max_drop else "failed" if low > max_drop else "not-run"
    reason = ""
    if verdict != "passed":
        reason = f"the drop is {drop:.4f}, {low:.4f} to {high:.4f}; allowed is {max_drop:g}"
    if verdict == "not-run":
        reason = f"these {len(reference)} images cannot tell: {reason}; give more images"
    return AccuracyCell(
        artefact, task, score.name, len(reference), before, after, low, high, max_drop, verdict,
        reason,
    )  # fmt: skip
