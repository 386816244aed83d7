"""Values of one activation -> the range that NVIDIA's Model Optimizer (modelopt) gives it.

    max         its MaxCalibrator
    percentile  its HistogramCalibrator, 99.99 %
    entropy     its HistogramCalibrator; formats of whole numbers alone
    mse         its MseCalibrator with its rounding, on the middles of our histogram's bins,
                each weighed by how often it occurs

ONNX Runtime runs the graph as it does for our own calibrators. HistogramCalibrator has an
mse of its own, which is not used: up to 0.47 it hands its rounding the bits where a bias is
expected, so that integers get a range without meaning and E4M3 a TypeError.

Source: https://github.com/NVIDIA/Model-Optimizer, modelopt/torch/quantization/calib.
"""

from __future__ import annotations

import math
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, CalibrationError, UsageError
from mtl_export_calibration.calibrators import entropy, mse
from mtl_export_calibration.collect import TensorStatistics
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import BINS, Histogram

EXTRA = "pip install 'mtl-export[quant]'"
# Its histogram keeps the first batch's bin width; with many times the bins it is slow and large.
MAX_GROWTH = 1024.0
# Of the largest magnitude: how far apart the candidates of its mse are.
MSE_STEP = 1.0 / 64


def load_modelopt() -> Any:
    """Return the module with its calibrators.

    Raises:
        BackendMissingError: modelopt is not installed, or cannot be imported.
    """
    if find_spec("modelopt") is None:
        raise _missing("not installed")
    try:
        with warnings.catch_warnings():
            # It warns of versions of transformers, of which nothing here is used.
            warnings.simplefilter("ignore")
            return import_module("modelopt.torch.quantization.calib")
    except Exception as error:  # whatever its own imports run into
        raise _missing(f"it cannot be imported ({type(error).__name__}: {error})") from error


def refuse_without_calibrator(method: str, number: NumberFormat) -> None:
    """Refuse what modelopt would choose no range for.

    Raises:
        UsageError: Activations stay float, or are to get E4M3 by entropy.
    """
    if not number.quantises_activations:
        raise UsageError(
            f"--engine modelopt --quantize {number.name}: a format of weights alone",
            expected="int8 or fp8, because an engine chooses the ranges of activations",
            fix="Leave --engine out",
        )
    if method == "entropy" and not number.is_integer:
        raise UsageError(
            f"--engine modelopt --method entropy: --quantize {number.name}",
            expected="int8, because its entropy calibrator knows evenly spaced numbers alone",
            fix="Pass --method max, or leave --engine out",
        )


class ModeloptStatistics(TensorStatistics):
    """What one activation looks like on one task, and modelopt's range for it.

    Args:
        method: How ranges are chosen.
        number: The format.
    """

    def __init__(self, method: str, number: NumberFormat) -> None:
        super().__init__()
        calib = load_modelopt()
        self._calibrator: Any = None
        if method == "max":
            self._calibrator = calib.MaxCalibrator()
        elif method != "mse":
            self._calibrator = calib.HistogramCalibrator(_bits(number))
        self._first_amax = 0.0
        self._zeros = 0

    def add(self, values: Array, keep: int) -> None:
        """Count ``values`` ``[N, I]``, here and in modelopt, and keep ``keep`` rows."""
        super().add(values, keep)
        if self._calibrator is None:
            return
        amax = float(np.abs(values).max(initial=0.0))
        if not (self._first_amax or amax):
            # Its histogram cannot begin with zeros alone: they wait for other values.
            self._zeros += values.size
            return
        self._first_amax = self._first_amax or amax
        if amax > MAX_GROWTH * self._first_amax:
            raise CalibrationError(
                f"--engine modelopt: a batch with values up to {amax:g} after one up to "
                f"{self._first_amax:g}",
                expected=(
                    f"at most {MAX_GROWTH:g} times as large, because its histograms keep the bin "
                    "width of the first batch"
                ),
                fix="Leave --engine out",
            )
        self._collect(np.array(values, np.float32).reshape(-1))

    def compute_amax(self, method: str, number: NumberFormat) -> float:
        """Return modelopt's range; ``method`` and ``number`` are those it was made for."""
        if self.histogram.amax == 0.0:
            return 0.0
        if method == "mse":
            return _least_squares(self.histogram, number)
        if method == "max":
            return float(self._calibrator.compute_amax())
        # As many candidates as ours, however many bins there are: it tries them in Python.
        growth = math.ceil(self.histogram.amax / self._first_amax)
        return float(self._calibrator.compute_amax(method, stride=entropy.STRIDE * growth))

    def _collect(self, values: Array) -> None:
        import torch

        if not values.size:
            return
        tensor = torch.from_numpy(values)
        if self._zeros:
            tensor = torch.cat([torch.zeros(self._zeros), tensor])
            self._zeros = 0
        self._calibrator.collect(tensor)


def _least_squares(histogram: Histogram, number: NumberFormat) -> float:
    import torch

    rounding = import_module("modelopt.torch.quantization.tensor_quant")
    counts = torch.from_numpy(histogram.counts)

    def rounded(x: torch.Tensor, amax: torch.Tensor) -> Any:
        if number.is_integer:
            return rounding.fake_tensor_quant(x, amax, None, _bits(number), False)
        return rounding.scaled_e4m3(x, amax, None, 4, 3)

    calibrator = load_modelopt().MseCalibrator(
        torch.tensor(histogram.amax, dtype=torch.float32),
        step_size=MSE_STEP,
        start_multiplier=mse.FIRST / BINS,
        stop_multiplier=1.0,
        quant_func=rounded,
        error_func=lambda x, rounded_x: counts * (x - rounded_x) ** 2,
    )
    calibrator.collect(torch.from_numpy(histogram.centers))
    return float(calibrator.compute_amax())


def _bits(number: NumberFormat) -> int | tuple[int, int]:
    """Return modelopt's word for a format; of E4M3 the bits of exponent and mantissa."""
    return int(number.largest).bit_length() + 1 if number.is_integer else (4, 3)


def _missing(found: str) -> BackendMissingError:
    return BackendMissingError(
        f"calibration engine modelopt: {found}",
        expected="the package nvidia-modelopt",
        fix=f"{EXTRA}, or leave --engine out: onnxruntime is always there",
    )
