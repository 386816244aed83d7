"""A batch of several tasks, inferred one task at a time.

    task_ids [B]  ->  one call with task_ids [1] for each task in it  ->  rows put back in order

B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mtl_export.errors import EngineRunError
from mtl_export.names import TASK_IDS

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array


def by_task(
    inputs: Mapping[str, Array], infer: Callable[[dict[str, Array]], Mapping[str, Array]]
) -> dict[str, Array]:
    """Return the outputs for a batch of several tasks, each inferred alone.

    Args:
        inputs: With ``task_ids`` int64 [B].
        infer: Takes the rows of one task, with ``task_ids`` [1].

    Raises:
        EngineRunError: ``task_ids`` are no int64 [B].
    """
    ids = inputs[TASK_IDS]
    counts = {len(value) for name, value in inputs.items() if name != TASK_IDS}
    if ids.dtype != np.int64 or ids.ndim != 1 or counts != {len(ids)}:
        raise EngineRunError(
            f"{TASK_IDS}: {ids.dtype} {list(ids.shape)}",
            expected="int64 [batch], because each row has one task",
            fix="Give each row one id",
        )
    joined: dict[str, Array] = {}
    for task in np.unique(ids):
        rows = np.flatnonzero(ids == task)
        own = {name: value[rows] for name, value in inputs.items()}
        own[TASK_IDS] = np.array([task], np.int64)
        for name, values in infer(own).items():
            shape = (len(ids), *values.shape[1:])
            joined.setdefault(name, np.empty(shape, values.dtype))[rows] = values
    return joined
