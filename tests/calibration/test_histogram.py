from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_export_calibration.histogram import BINS, Histogram


def counted(*parts: list[float]) -> Histogram:
    """Return a histogram of parts that were added one after another."""
    histogram = Histogram()
    for part in parts:
        histogram.add(np.array(part, np.float32))
    return histogram


PARTS = st.lists(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(PARTS)
def test_counts_are_numpys_on_the_final_bins(parts: list[list[float]]) -> None:
    """Growing while values come gives the bins that counting all at once gives."""
    histogram = counted(*parts)
    magnitudes = np.abs(np.array([value for part in parts for value in part], np.float32))
    assert histogram.amax == magnitudes.max()
    assert histogram.total == len(magnitudes)
    if histogram.limit:
        expected, _ = np.histogram(magnitudes, BINS, (0.0, histogram.limit))
        np.testing.assert_array_equal(histogram.counts, expected)
        assert histogram.amax < histogram.limit


@settings(max_examples=60, deadline=None)
@given(PARTS)
def test_merging_is_adding_all_to_one(parts: list[list[float]]) -> None:
    """Histograms of different limits add exactly."""
    merged = Histogram()
    for part in parts:
        merged.merge(counted(part))
    whole = counted(*parts)
    assert (merged.limit, merged.amax) == (whole.limit, whole.amax)
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_merging_weighs_counts() -> None:
    """A weight multiplies counts; a weight of 0 leaves the other out, its range too."""
    histogram = counted([1.0, 2.0])
    histogram.merge(counted([1.0]), 2.5)
    assert histogram.total == 4.5
    histogram.merge(counted([1000.0]), 0.0)
    assert (histogram.total, histogram.amax) == (4.5, 2.0)
