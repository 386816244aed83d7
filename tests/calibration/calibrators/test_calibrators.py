"""Every calibrator held against its definition, written plainly on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.calibrators import CALIBRATORS
from mtl_export_calibration.calibrators.entropy import entropy_amax
from mtl_export_calibration.calibrators.max import max_amax
from mtl_export_calibration.calibrators.mse import mse_amax
from mtl_export_calibration.calibrators.percentile import percentile_amax
from mtl_export_calibration.formats import FP8, INT8, NumberFormat
from mtl_export_calibration.histogram import BINS, Histogram


def heavy_tailed(seed: int = 0, count: int = 40_000) -> Array:
    """Return values with a few outliers, as activations have them."""
    generator = np.random.default_rng(seed)
    values = generator.standard_t(4, count)
    values[:3] = (60.0, -75.0, 41.0)
    return values.astype(np.float32)


def histogram_of(values: Array) -> Histogram:
    """Return the values' histogram."""
    histogram = Histogram()
    histogram.add(values)
    return histogram


def test_max_keeps_the_largest_magnitude() -> None:
    """The outlier sets the range."""
    values = heavy_tailed()
    assert max_amax(histogram_of(values), INT8) == np.abs(values).max()


def test_percentile_leaves_one_in_ten_thousand_out() -> None:
    """At most a bin above the value that 99.99 % do not exceed."""
    values = np.sort(np.abs(heavy_tailed()))
    histogram = histogram_of(values)
    exact = values[int(np.ceil(0.9999 * len(values))) - 1]
    assert exact <= percentile_amax(histogram, INT8) <= exact + histogram.width


def test_percentile_is_never_above_the_maximum() -> None:
    """With few values nothing is left out, and the bin's edge does not count."""
    assert percentile_amax(histogram_of(np.array([0.3, 0.7], np.float32)), INT8) == np.float32(0.7)


@pytest.mark.parametrize("number", [INT8, FP8], ids=["int8", "fp8"])
def test_mse_takes_the_amax_of_the_smallest_squared_error(number: NumberFormat) -> None:
    """No other edge gives the values themselves an error that is smaller by more than 1 %."""
    values = np.abs(heavy_tailed())
    histogram = histogram_of(values)

    def error(amax: float) -> float:
        scale = amax / number.largest
        if number.is_integer:
            rounded = np.clip(np.round(values / scale), -127, 127) * scale
        else:
            cut = np.clip(values / scale, -448, 448).astype(number.storage)
            rounded = cut.astype(np.float64) * scale
        return float(np.mean((values - rounded) ** 2))

    chosen = mse_amax(histogram, number)
    edges = [edge * histogram.width for edge in range(128, BINS + 1, 8)]
    best = min(error(min(edge, histogram.amax)) for edge in edges)
    assert error(chosen) <= 1.01 * best
    # Outliers cost steps in int8; a floating-point format has room for them.
    assert (chosen < histogram.amax) == (number is INT8)


def entropy_by_definition(counts: list[float], width: float) -> float:
    """Return the amax for int8, bin by bin as the talk describes it."""
    last = max(i for i, count in enumerate(counts) if count) + 1
    best, best_edge = float("inf"), last
    for edge in [*range(128, last, 8), last]:
        p = counts[:edge]
        p[-1] += sum(counts[edge:])
        groups: dict[int, list[int]] = {}
        for i in range(edge):
            level = min(127, int(np.rint((i + 0.5) * width / (edge * width / 127))))
            groups.setdefault(level, []).append(i)
        q = [0.0] * edge
        for members in groups.values():
            filled = [i for i in members if counts[i]]
            for i in filled:
                q[i] = sum(counts[j] for j in members) / len(filled)
        p_total, q_total = sum(p), sum(q)
        divergence = sum(
            a / p_total * np.log((a / p_total) / max(b / q_total, 1e-9))
            for a, b in zip(p, q, strict=True)
            if a
        )
        if divergence < best:
            best, best_edge = divergence, edge
    return best_edge * width


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_is_the_smallest_divergence(seed: int) -> None:
    """The same edge as the plain loops choose, and below the outliers."""
    # Bins up to 600 of 2,048 keep the plain loops short.
    values = heavy_tailed(seed, 5_000) / 75.0 * 0.29
    histogram = histogram_of(np.append(values, np.float32(0.29)))
    counts = [float(count) for count in histogram.counts]
    expected = min(entropy_by_definition(counts, histogram.width), histogram.amax)
    assert entropy_amax(histogram, INT8) == pytest.approx(expected)
    assert expected < histogram.amax


@pytest.mark.parametrize("method", CALIBRATORS)
def test_zeros_have_no_range(method: str) -> None:
    """A tensor that is always zero gets 0, which the format's scale makes 1."""
    assert CALIBRATORS[method](histogram_of(np.zeros(10, np.float32)), INT8) == 0.0
