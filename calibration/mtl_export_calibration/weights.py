"""One weight -> its quantised form: a scale per output channel, or per block of inputs.

int8, fp8   stored as the weight, scale [O]
int4        MatMul only: stored [I, O], scale [I / 64, O], see ``rounding``
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.formats import INT4_BLOCK, NumberFormat
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.rounding import block_scale, compensated


def refusal(layer: QuantLayer, number: NumberFormat) -> str:
    """Return why ``layer`` cannot have ``number``'s weights; empty if it can."""
    if number.quantises_activations:
        return ""
    if layer.op_type != "MatMul":
        return f"{number.name} weights are for MatMul only"
    if layer.shape[0] % INT4_BLOCK:
        return f"its {layer.shape[0]} inputs are no multiple of {INT4_BLOCK}"
    return ""


@dataclass(frozen=True)
class WeightGrid:
    """The scales of one weight, and what it is rounded to.

    Attributes:
        number: Its format.
        scale: float32, ``[O]`` or ``[I / 64, O]``.
        axis: The weight's axis of output channels; blocks run along the other.
        codes: int8, the weight as it is stored; None where it is rounded to the nearest.
    """

    number: NumberFormat
    scale: Array
    axis: int
    codes: Array | None = None

    def stored(self, values: Array) -> Array:
        """Return the weight as it is stored."""
        if self.codes is not None:
            return self.codes.astype(self.number.storage)
        return self.number.stored(values, self._spread(values))

    def rounded(self, values: Array) -> Array:
        """Return the weight after quantising and dequantising, float32."""
        result: Array = self.stored(values).astype(np.float32) * self._spread(values)
        return result

    def step(self, values: Array) -> Array:
        """Return how far apart neighbouring stored values are, ``[O]``.

        Numbers of a floating-point format lie the denser the smaller they are: theirs is
        the distance at the channel's mean magnitude.
        """
        if self.number.is_integer:
            return self.scale if self.scale.ndim == 1 else self.scale.max(axis=0)
        others = tuple(a for a in range(values.ndim) if a != self.axis)
        ratio = np.abs(values).mean(axis=others) / self.scale
        # E4M3: three bits behind the point, 2^-9 the smallest number.
        exponents = np.floor(np.log2(np.maximum(ratio, 2.0**-6)))
        step: Array = self.scale * np.exp2(exponents - 3)
        return step

    def _spread(self, values: Array) -> Array:
        """Return the scale in a shape that broadcasts to the weight's."""
        if self.scale.ndim == 2:
            return np.repeat(self.scale, INT4_BLOCK, axis=0)
        shape = [1] * values.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)


def weight_grid(
    values: Array, layer: QuantLayer, number: NumberFormat, rows: Array | None = None
) -> WeightGrid:
    """Return the grid for a weight; of int8 and fp8 it keeps each channel's largest magnitude.

    Args:
        values: The weight.
        layer: Its layer.
        number: The format.
        rows: Some rows of the layer's input, which int4 is rounded for; None: to the nearest.
    """
    axis = layer.channel_axis
    if number.quantises_activations:
        magnitudes = np.abs(values.astype(np.float32))
        amax = magnitudes.max(axis=tuple(a for a in range(values.ndim) if a != axis))
        return WeightGrid(number, number.scale(amax), axis)
    scale = block_scale(values, number, INT4_BLOCK)
    if rows is None:
        return WeightGrid(number, scale, axis)
    wide = np.repeat(scale, INT4_BLOCK, axis=0)
    return WeightGrid(number, scale, axis, compensated(values, wide, rows, number))
