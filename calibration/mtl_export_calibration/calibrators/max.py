"""Keep every value: ``amax = max |x|``. Nothing is cut; one outlier sets the step of all."""

from __future__ import annotations

from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import Histogram


def max_amax(histogram: Histogram, number: NumberFormat) -> float:
    """Return the largest magnitude seen."""
    return histogram.amax
