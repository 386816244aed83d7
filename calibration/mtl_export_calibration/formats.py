"""The number formats that weights and activations are quantised to, all symmetric.

    stored = round(value / scale)         value' = stored * scale         scale = amax / largest

    name  stored as       range        weights                         activations   opset
    int8  INT8            -127 .. 127  a scale per output channel      per tensor    19
    fp8   FLOAT8 E4M3FN   -448 .. 448  a scale per output channel      per tensor    19
    int4  INT4            -8 .. 7      a scale per 64 inputs, output   stay float    21

Zero points are 0: TensorRT refuses others. In int8 weights do not use -128; an activation below
-127 steps, which is cut anyway, is stored as -128 by QuantizeLinear and counts as -127 here.

Default calibrators, by the logits of examples/01 (SQNR of the worst task): int8 percentile 19 dB,
mse 18, max 17, entropy 12; E4M3 has room for outliers, and max gives 27 dB.

Source: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html (ties to even, saturation);
E4M3: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mtl_export.checkpoint.tensors import Array

# TensorRT takes 64 and 128, and the smaller costs less accuracy. Source:
# https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-schemes.html
INT4_BLOCK = 64
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One format.

    Attributes:
        name: ``int8``, ``fp8`` or ``int4``.
        smallest: The smallest number that is used.
        largest: The largest one.
        storage: numpy dtype of stored values.
        opset: The smallest ONNX opset that has it as Q/DQ.
        is_integer: Values are rounded to whole numbers, not to floating-point ones.
        quantises_activations: Activations are quantised, not weights alone.
        max_drop: Points of accuracy that the worst task may lose, unless the user says.
        method: Calibrator of activations, unless the user says.
    """

    name: str
    smallest: float
    largest: float
    storage: np.dtype[Any]
    opset: int
    is_integer: bool
    quantises_activations: bool
    max_drop: float
    method: str

    def scale(self, amax: Array) -> Array:
        """Return float32 scales for largest magnitudes; of zeros, 1."""
        scale = (np.asarray(amax, np.float64) / self.largest).astype(np.float32)
        return np.where(scale < _TINY, np.float32(1), scale)

    def stored(self, values: Array, scale: Array) -> Array:
        """Return ``values`` as they are stored; beyond its range they are cut."""
        # In float32, as QuantizeLinear divides.
        ratio = np.asarray(values, np.float32) / np.asarray(scale, np.float32)
        ratio = np.clip(ratio, self.smallest, self.largest)
        if self.is_integer:
            ratio = np.rint(ratio)
        stored: Array = ratio.astype(self.storage)
        return stored

    def rounded(self, values: Array, scale: Array) -> Array:
        """Return ``values`` after quantising and dequantising, float32."""
        result: Array = self.stored(values, scale).astype(np.float32) * scale
        return result


INT8 = NumberFormat("int8", -127.0, 127.0, np.dtype(np.int8), 19, True, True, 1.0, "percentile")
FP8 = NumberFormat(
    "fp8", -448.0, 448.0, np.dtype(ml_dtypes.float8_e4m3fn), 19, False, True, 0.5, "max"
)
INT4 = NumberFormat("int4", -8.0, 7.0, np.dtype(ml_dtypes.int4), 21, True, False, 1.0, "max")
FORMATS = (INT8, FP8, INT4)


def format_named(name: str) -> NumberFormat:
    """Return the format called ``name``."""
    return next(number for number in FORMATS if number.name == name)
