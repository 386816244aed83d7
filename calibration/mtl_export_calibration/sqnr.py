"""What quantising one layer costs it: signal to noise of its output, in decibels.

    SQNR = 10 log10( sum y^2 / sum (y - y')^2 )       y = x W,   y' = Q(x) Q(W)

x are some rows of the task's own activations, the same that int4 weights are rounded for.
For a convolution, whose rows are not kept as patches, the noise of input and weight is added
up: 1 / SQNR = 1 / SQNR_x + 1 / SQNR_W.
"""

from __future__ import annotations

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.metrics import sqnr_db
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.weights import WeightGrid


def layer_sqnr_db(
    rows: Array, weight: Array, grid: WeightGrid, layer: QuantLayer, amax: float
) -> float:
    """Return what quantising ``layer`` alone costs its output.

    Args:
        rows: float32 ``[K, I]``, some of its inputs.
        weight: Its weight, ``[I, O]`` for MatMul.
        grid: Of that weight.
        layer: The layer.
        amax: The range of its input.
    """
    number = grid.number
    x = number.rounded(rows, number.scale(np.array(amax))) if _rounds_x(number) else rows
    w = grid.rounded(weight)
    if layer.op_type == "MatMul":
        return sqnr_db(rows @ weight.astype(np.float32), x @ w)
    both = (sqnr_db(rows, x), sqnr_db(weight, w))
    return float(-10.0 * np.log10(sum(10.0 ** (-value / 10.0) for value in both)))


def _rounds_x(number: NumberFormat) -> bool:
    return number.quantises_activations
