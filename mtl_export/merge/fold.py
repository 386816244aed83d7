"""Fold one task into one weight: ``W_t = diag(gain_t) (W + up core_t down)``, rounded once.

O outputs, I inputs, K the smaller inner rank. The sum is taken in float64 and rounded
to the output dtype at the very end, so that a bfloat16 base does not also lose the
delta's rounding. The product is ``(up core) down`` or ``up (core down)``, whichever has
the smaller inner dimension: K multiplications an element, not U.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from mtl_export.adapters.normal_form import AnyAdapter, Factors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import BaseModelError
from mtl_export.merge.rounding import Scratch, round_values

# 64 Ki elements: base, sum and float32 copy are 1.3 MB, which a core's own cache holds.
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Delta:
    """What a task adds to one weight, ready to be multiplied out row by row.

    Attributes:
        left: float64 ``[O, K]``.
        right: float64 ``[K, I]``.
        gain: float64 ``[O]``, or None where every gain is 1.
        transposed: The weight is stored ``[I, O]``: then left is ``[I, K]``, right
            ``[K, O]``, and the gain is that of the columns.
    """

    left: Array
    right: Array
    gain: Array | None
    transposed: bool = False

    def fold(self, base: Array, rows: slice, scratch: Scratch) -> Array:
        """Return the exact rows of the task's weight, flat, in ``scratch.total``.

        Args:
            base: The base's rows as float64, flat; as many as ``rows`` says.
            rows: Which rows of the weight they are.
            scratch: Holds the result.
        """
        count = base.size // self.right.shape[1]
        total: Array = scratch.total[: base.size]
        grid = total.reshape(count, -1)
        np.matmul(self.left[rows], self.right, out=grid)
        np.add(total, base, out=total)
        if self.gain is not None:
            np.multiply(grid, self.gain if self.transposed else self.gain[rows, None], out=grid)
        return total


def task_delta(layer: AnyAdapter, task_index: int) -> Delta | None:
    """Return what task t adds to the layer's weight, None if it leaves it alone."""
    factors = layer.factors(task_index)
    gain = None if layer.gain is None else layer.gain[task_index]
    if factors is None or not factors.core.any():
        if gain is None:
            return None
        left, right = np.zeros((layer.out_features, 1)), np.zeros((1, layer.in_features))
    else:
        left, right = _two_factors(factors)
    if layer.transposed:
        left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
    return Delta(left, right, gain, layer.transposed)


def _two_factors(factors: Factors) -> tuple[Array, Array]:
    # One LoRA per task stacked side by side has a core that is zero outside the task's block.
    up_used, down_used = factors.core.any(axis=1), factors.core.any(axis=0)
    if up_used.all() and down_used.all():
        core, up, down = factors.core, factors.up, factors.down
    else:
        core = factors.core[np.ix_(up_used, down_used)]
        up, down = factors.up[:, up_used], factors.down[down_used]
    up, down = up.astype(np.float64), down.astype(np.float64)
    if core.shape[1] <= core.shape[0]:
        return up @ core, down
    return up, core @ down


def merged_weight(weight: Array, layer: AnyAdapter, task_index: int, dtype: str) -> Array:
    """Return task t's own weight.

    Args:
        weight: The base weight as it is stored, ``[O, I]`` or ``[I, O]``, any floating dtype.
        layer: The layer's adapter.
        task_index: t.
        dtype: Output dtype, a key of ``NUMPY_DTYPES``.

    Raises:
        BaseModelError: The result does not fit the dtype's range, or the base has NaN.
    """
    where = f"{layer.module}, task id {task_index}"
    delta = task_delta(layer, task_index)
    if delta is None:
        return rounded(weight, dtype, where)
    result: Array = np.empty(weight.shape, NUMPY_DTYPES[dtype])
    width = weight.shape[1]
    step = max(1, BLOCK // width)
    scratch = Scratch(step * width)
    finite = True
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, begin + step)
        base = scratch.widen(np.ascontiguousarray(weight[rows]).reshape(-1))
        exact = delta.fold(base, rows, scratch)
        finite &= scratch.round_to(exact, dtype, result[rows].reshape(-1))
    if not finite:
        refuse_not_finite(where, dtype)
    return result


def rounded(values: Array, dtype: str, where: str) -> Array:
    """Return ``values`` rounded once, to the nearest value of ``dtype``, ties to even.

    Args:
        values: Any floating dtype.
        dtype: Output dtype, a key of ``NUMPY_DTYPES``.
        where: What the values are, for the error.

    Raises:
        BaseModelError: A value is NaN or does not fit the dtype's range.
    """
    result, finite = round_values(values, dtype, Scratch(min(BLOCK, max(1, values.size))))
    if not finite:
        refuse_not_finite(where, dtype)
    return result


def refuse_not_finite(where: str, dtype: str) -> NoReturn:
    """Raise the error for a weight that is not finite in ``dtype``.

    Raises:
        BaseModelError: Always.
    """
    raise BaseModelError(
        f"{where}: NaN or Inf in {dtype}",
        expected="finite weights, because they would spread to every output of the task",
        fix="Check the base for NaN, or merge into --dtype fp32 or bf16",
    )
