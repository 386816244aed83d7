"""Scores of maps, against values counted by hand or from their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mtl_export as mx
from mtl_export.dense.scores import ANGLE, MAXF, MIOU, ODSF, RMSE, judge_scores
from mtl_export.errors import CalibrationError
from tests.dense.checkpoints import checkpoint_file


def test_miou_is_the_mean_over_labelled_classes() -> None:
    """Class 2 has no label, 255 does not count."""
    labels = np.array([[0, 0], [1, 255]])
    found = np.array([[0, 1], [1, 2]])
    raw = np.eye(3)[found].transpose(2, 0, 1)
    # Class 0: 1 of 2; class 1: 1 of 2.
    assert MIOU.total(MIOU.sums(raw, labels)) == pytest.approx(0.5)


def brute_f(raw: np.ndarray, labels: np.ndarray, squared: float) -> float:
    """Return the best F, threshold by threshold."""
    value, right = 255 / (1 + np.exp(-raw[0])), labels > 0
    best = 0.0
    for threshold in range(255):
        found = value > threshold
        hits = (found & right).sum()
        if hits:
            p, r = hits / found.sum(), hits / right.sum()
            best = max(best, (1 + squared) * p * r / (squared * p + r))
    return best


def test_f_is_the_best_of_all_thresholds() -> None:
    """As counted one by one, for both weights."""
    draw = np.random.default_rng(3)
    raw, labels = draw.normal(size=(1, 9, 9)), draw.integers(0, 2, (9, 9))
    assert MAXF.total(MAXF.sums(raw, labels)) == pytest.approx(brute_f(raw, labels, 0.3))
    assert ODSF.total(ODSF.sums(raw, labels)) == pytest.approx(brute_f(raw, labels, 1.0))


def test_angles_are_in_degrees_and_only_where_labelled() -> None:
    """One pixel off by 90 degrees, one right, one unlabelled."""
    labels = np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]], np.float64)
    raw = np.array([[[0, 0, 2], [0, 3, 0], [1, 0, 0]]], np.float64).transpose(2, 0, 1)
    assert ANGLE.total(ANGLE.sums(raw, labels)) == pytest.approx(-((90**2 / 2) ** 0.5) / 100)


def test_depths_count_where_there_are_any() -> None:
    """0 is no depth."""
    labels, raw = np.array([[2.0, 0.0]]), np.array([[[3.0, 9.0]]])
    assert RMSE.total(RMSE.sums(raw, labels)) == pytest.approx(-1 / 100)


def maps(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return raw values of two classes and labels that they mostly give."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 2, (count, size, size))
    right = np.stack([1.0 - labels, labels], 1)
    return right + 0.3 * draw.normal(size=right.shape), labels


def test_the_gate_passes_fails_and_cannot_tell() -> None:
    """The same answers pass; half of them turned round fail; too few cannot tell."""
    raw, labels = maps(8, 64)
    before = np.stack([MIOU.sums(one, label) for one, label in zip(raw, labels, strict=True)])
    worse = raw.copy()
    worse[:, :, :32] = worse[:, ::-1, :32]
    after = np.stack([MIOU.sums(one, label) for one, label in zip(worse, labels, strict=True)])

    def verdict(candidate: np.ndarray, allowed: float) -> str:
        return judge_scores("onnx", "semseg", before, candidate, size=64, max_drop=allowed).verdict

    assert verdict(before, 0.1) == "passed"
    assert verdict(after, 0.1) == "failed"
    assert verdict(before, 0.001) == "not-run"


def test_parity_counts_scores_on_labelled_images(tmp_path: Path) -> None:
    """Of raw RGB images of another size, and says what it cannot use."""
    file = checkpoint_file(tmp_path)
    mx.merge(file, output=tmp_path / "out" / "merged", tasks=["sal"])
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (6, 50, 70, 3)).astype(np.uint8)
    np.savez(tmp_path / "rows.npz", images=pixels, sal=draw.integers(0, 2, (6, 64, 64)))
    out = tmp_path / "out"
    result = mx.parity(file, output=out, dataset=tmp_path / "rows.npz", max_drop=20, quick=True)
    (cell,) = result.report.accuracy
    assert (cell.task, cell.score, cell.rows, cell.verdict) == ("sal", "maxf", 6, "passed")
    assert cell.drop == pytest.approx(0, abs=1e-6)
    np.savez(tmp_path / "other.npz", images=pixels, sal=draw.integers(0, 2, (6, 32, 32)))
    with pytest.raises(CalibrationError, match="labels of sal"):
        mx.parity(file, output=out, dataset=tmp_path / "other.npz", quick=True)
