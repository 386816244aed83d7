"""Keep what costs least: the amax of the smallest mean squared error of rounding and cutting.

    amax = argmin_a  sum_i counts_i (center_i - Q_a(center_i))^2

over the upper edges a of the bins up to max |x|. Q_a rounds to the format with amax a.

Source: Wu et al. 2020, https://arxiv.org/abs/2004.09602, section 3.2 lists the usual
calibrators; this is the definition of "mse" in nvidia-modelopt's histogram calibrator.
"""

from __future__ import annotations

import numpy as np

from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import BINS, Histogram

# Edges tried, evenly from FIRST on: an amax below 128 of 2,048 bins cuts off 15/16 of the range.
FIRST, STRIDE = 128, 8


def mse_amax(histogram: Histogram, number: NumberFormat) -> float:
    """Return the candidate with the smallest error; of equals, the largest."""
    used = histogram.counts > 0
    centers, counts = histogram.centers[used], histogram.counts[used]
    best, best_error = histogram.amax, np.inf
    edges = [*range(FIRST, BINS, STRIDE), BINS]
    for amax in dict.fromkeys(min(edge * histogram.width, histogram.amax) for edge in edges):
        if amax <= 0.0:
            continue
        errors = centers - number.rounded(centers, number.scale(np.array(amax)))
        error = float((counts * errors.astype(np.float64) ** 2).sum())
        if error <= best_error:
            best, best_error = amax, error
    return best
