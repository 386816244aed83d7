from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.cache import read_arrays, write_arrays
from mtl_export_calibration.formats import INT4, INT4_BLOCK
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.rounding import CUTS, DAMPING, block_scale, compensated
from mtl_export_calibration.weights import weight_grid

I, O, K = 2 * INT4_BLOCK, 3, 80  # noqa: E741 - the shapes' own names
LAYER = QuantLayer("q", "q", "MatMul", "x", "q.weight", (I, O))


@pytest.fixture(scope="module")
def weight() -> Array:
    """Return a weight whose second block is loud, with one outlier and a channel of zeros."""
    values = np.random.default_rng(7).normal(size=(I, O))
    values[INT4_BLOCK:] *= 30.0
    values[5, 0] = 6.0
    values[:, 2] = 0.0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> Array:
    """Return inputs that go together, as activations do, one of them never used."""
    generator = np.random.default_rng(8)
    found = generator.normal(size=(K, 12)) @ generator.normal(size=(12, I))
    found += 0.3 * generator.normal(size=(K, I))
    found[:, 9] = 0.0
    return (found * np.geomspace(0.1, 3.0, I)).astype(np.float32)


def test_a_block_has_the_scale_with_the_least_error(weight: Array) -> None:
    """One block and channel after the other, by the definition; zeros have a scale of 1."""
    scale = block_scale(weight, INT4, INT4_BLOCK)
    assert scale.shape == (2, O)
    for block in range(2):
        for channel in range(2):
            own = weight[block * INT4_BLOCK : (block + 1) * INT4_BLOCK, channel].astype(float)
            candidates = [cut * np.abs(own).max() / 7 for cut in CUTS]
            errors = [
                ((np.clip(np.rint(own / one), -8, 7) * one - own) ** 2).sum() for one in candidates
            ]
            expected = candidates[int(np.argmin(errors))]
            assert scale[block, channel] == pytest.approx(expected, rel=1e-6)
    assert scale[0, 0] < 0.9 * 6.0 / 7  # the outlier is cut
    assert scale[:, 2].tolist() == [1.0, 1.0]


def by_definition(weight: Array, scale: Array, rows: Array) -> Array:
    """Return the codes with an inverse of what is left for every input, in float64."""
    x, left = rows.astype(float), weight.astype(float)
    hessian = x.T @ x
    order = sorted(range(len(left)), key=lambda i: -hessian[i, i])
    hessian += DAMPING * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    codes = np.zeros(weight.shape)
    for place, i in enumerate(order):
        rest = order[place:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        exact = weight[i].astype(float) / scale[i]
        beside = np.clip([np.floor(exact), np.ceil(exact)], -8, 7)
        codes[i] = np.clip(np.rint(left[i] / scale[i]), *beside)
        error = left[i] - codes[i] * scale[i]
        left[rest] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
    return codes


def test_each_error_is_made_good_by_the_inputs_that_are_left(weight: Array, rows: Array) -> None:
    """By least squares over them, as the definition says; float32 may tip a tie."""
    scale = np.repeat(block_scale(weight, INT4, INT4_BLOCK), INT4_BLOCK, axis=0)
    found = compensated(weight, scale, rows, INT4)
    assert (found == by_definition(weight, scale, rows)).mean() > 0.99


def test_the_product_errs_less_and_no_weight_by_a_whole_step(weight: Array, rows: Array) -> None:
    """Less than half the noise of rounding to the nearest, on rows that were not seen too."""
    nearest = weight_grid(weight, LAYER, INT4)
    grid = weight_grid(weight, LAYER, INT4, rows[::2])
    assert np.array_equal(grid.scale, nearest.scale)
    assert grid.stored(weight).dtype == INT4.storage

    def noise(values: Array) -> float:
        return float(((rows[1::2] @ (values - weight)) ** 2).sum())

    assert noise(grid.rounded(weight)) < 0.5 * noise(nearest.rounded(weight))
    step = np.repeat(grid.scale, INT4_BLOCK, axis=0)
    exact = np.clip(weight / step, -8, 7)
    assert np.abs(grid.stored(weight).astype(np.float32) - exact).max() < 1
    assert not grid.rounded(weight)[:, 2].any()


def test_inputs_that_are_never_used_leave_the_nearest(weight: Array) -> None:
    """There is no error to make good."""
    grid = weight_grid(weight, LAYER, INT4, np.zeros((4, I), np.float32))
    assert np.array_equal(grid.rounded(weight), weight_grid(weight, LAYER, INT4).rounded(weight))


def test_rows_are_kept_for_exactly_one_question(rows: Array, tmp_path: Path) -> None:
    """Another key, a file cut short or none are absent."""
    path, key = tmp_path / "rows.npz", {"data": "a"}
    assert read_arrays(path, key) is None
    write_arrays(path, key, {"layer/x": rows})
    kept = read_arrays(path, key)
    assert kept is not None
    assert list(kept) == ["layer/x"]
    assert np.array_equal(kept["layer/x"], rows)
    assert read_arrays(path, {"data": "b"}) is None
    path.write_bytes(path.read_bytes()[:-200])
    assert read_arrays(path, key) is None
