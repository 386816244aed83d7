"""From how often a tensor takes which magnitude to the magnitude that quantisation keeps."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from mtl_export_calibration.calibrators.entropy import entropy_amax
from mtl_export_calibration.calibrators.max import max_amax
from mtl_export_calibration.calibrators.mse import mse_amax
from mtl_export_calibration.calibrators.percentile import percentile_amax
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import Histogram

Calibrator = Callable[[Histogram, NumberFormat], float]
CALIBRATORS: MappingProxyType[str, Calibrator] = MappingProxyType(
    {
        "max": max_amax,
        "percentile": percentile_amax,
        "entropy": entropy_amax,
        "mse": mse_amax,
    }
)
