"""Keep all but the largest 0.01 %: the smallest edge with at least 99.99 % at or below it.

Source: Wu et al. 2020, https://arxiv.org/abs/2004.09602, section 3.2 and table 5: 99.99 %
is the one percentile without a large loss on any of their networks.
"""

from __future__ import annotations

import numpy as np

from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import Histogram

SHARE = 0.9999


def percentile_amax(histogram: Histogram, number: NumberFormat) -> float:
    """Return the upper edge of the bin that completes ``SHARE`` of all values."""
    cumulative = np.cumsum(histogram.counts)
    place = int(np.searchsorted(cumulative, SHARE * histogram.total))
    return min(histogram.amax, (place + 1) * histogram.width)
