"""Fold one task into one weight: ``W_t = W + up . core_t . down``, rounded once.

O outputs, I inputs. The sum is taken in float64 and rounded to the output dtype at
the very end, so that a bfloat16 base does not also lose the delta's rounding.
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import BaseModelError


def merged_weight(weight: Array, layer: LayerAdapter, task_index: int, dtype: str) -> Array:
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
    with np.errstate(over="ignore"):
        rounded: Array = exact.astype(NUMPY_DTYPES[dtype])
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise BaseModelError(
            where=f"{layer.module}, task id {task_index}",
            found=f"NaN or Inf after merging into {dtype}"
            f" (largest exact value {np.nanmax(np.abs(exact)):.3g})",
            expected="finite weights",
            why="they would spread to every output of the task",
            fix="Check the base for NaN, or merge into --dtype fp32 or bf16",
        )
    return rounded
