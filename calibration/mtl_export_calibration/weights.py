"""One weight -> its quantised form: a scale per output channel, or per block of inputs.

int8, fp8   stored as the weight, scale [O]
int4        MatMul only: stored [I, O], scale [I / 32, O]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.formats import INT4_BLOCK, NumberFormat
from mtl_export_calibration.layers import QuantLayer


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
    """The scales of one weight.

    Attributes:
        number: Its format.
        scale: float32, ``[O]`` or ``[I / 32, O]``.
        axis: The weight's axis of output channels; blocks run along the other.
    """

    number: NumberFormat
    scale: Array
    axis: int

    def stored(self, values: Array) -> Array:
        """Return the weight as it is stored."""
        return self.number.stored(values, self._spread(values))

    def rounded(self, values: Array) -> Array:
        """Return the weight after quantising and dequantising, float32."""
        return self.number.rounded(values, self._spread(values))

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


def weight_grid(values: Array, layer: QuantLayer, number: NumberFormat) -> WeightGrid:
    """Return the grid for a weight: the largest magnitude of each channel is kept."""
    magnitudes = np.abs(values.astype(np.float32))
    axis = layer.channel_axis
    if number.quantises_activations:
        amax = magnitudes.max(axis=tuple(a for a in range(values.ndim) if a != axis))
    else:
        amax = magnitudes.reshape(-1, INT4_BLOCK, values.shape[1]).max(axis=1)
    return WeightGrid(number, number.scale(amax), axis)
