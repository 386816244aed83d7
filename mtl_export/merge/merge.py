"""Fold one task into one weight: ``W_t = diag(gain_t) (W + up core_t down)``, rounded once.

O outputs, I inputs. The sum is taken in float64 and rounded to the output dtype at
the very end, so that a bfloat16 base does not also lose the delta's rounding.
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters.normal_form import AnyAdapter
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import BaseModelError


def merged_weight(weight: Array, layer: AnyAdapter, task_index: int, dtype: str) -> Array:
    """Return task t's own weight.

    Args:
        weight: The base weight ``[O, I]``, any floating dtype.
        layer: The layer's adapter.
        task_index: t.
        dtype: Output dtype, a key of ``NUMPY_DTYPES``.

    Raises:
        BaseModelError: The result does not fit the dtype's range, or the base has NaN.
    """
    exact = weight.astype(np.float64) + layer.delta(task_index)
    if layer.gain is not None:
        exact *= layer.gain[task_index][:, None]
    return rounded(exact, dtype, f"{layer.module}, task id {task_index}")


def rounded(values: Array, dtype: str, where: str) -> Array:
    """Return ``values`` rounded once, to the nearest value of ``dtype``, ties to even.

    Args:
        values: Any floating dtype.
        dtype: Output dtype, a key of ``NUMPY_DTYPES``.
        where: What the values are, for the error.

    Raises:
        BaseModelError: A value is NaN or does not fit the dtype's range.
    """
    with np.errstate(over="ignore", under="ignore"):
        # ml_dtypes goes from float64 to bfloat16 by way of float32, which rounds twice.
        via_odd = dtype == "BF16" and values.dtype == np.float64
        result: Array = (_odd_float32(values) if via_odd else values).astype(NUMPY_DTYPES[dtype])
    if not np.isfinite(result.astype(np.float64)).all():
        largest = np.abs(values.astype(np.float64)).max(initial=0.0)
        raise BaseModelError(
            where=where,
            found=f"NaN or Inf in {dtype} (largest exact value {largest:.3g})",
            expected="finite weights",
            why="they would spread to every output of the task",
            fix="Check the base for NaN, or merge into --dtype fp32 or bf16",
        )
    return result


def _odd_float32(exact: Array) -> Array:
    """Return float64 values as float32, every inexact one with an odd last bit.

    Odd is never half way between two bfloat16, so a second rounding to nearest gives what
    one rounding of ``exact`` gives. Source: Boldo and Melquiond, "Emulation of a FMA and
    correctly rounded sums", IEEE Trans. Computers 57(4), 2008, doi 10.1109/TC.2007.70819.
    """
    nearest = exact.astype(np.float32)
    inexact = nearest.astype(np.float64) != exact
    even = nearest.view(np.uint32) % 2 == 0
    beyond = np.where(nearest < exact, np.inf, -np.inf).astype(np.float32)
    odd: Array = np.where(inexact & even, np.nextafter(nearest, beyond), nearest)
    return odd
