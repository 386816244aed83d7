"""A graph that takes one task for the whole batch, run as one that takes a task for each row.

    task_ids [B]  ->  one call with task_ids [1] for each task in it  ->  rows put back in order

B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import numpy as np
from typing_extensions import Self

from mtl_export.checkpoint.tensors import Array
from mtl_export.runtime.runner import Runner

TASK_IDS = "task_ids"


class OneTaskRunner:
    """A runner whose batches may mix tasks, around one whose may not.

    Args:
        runner: Of a graph exported with ``--task-input scalar``.
    """

    def __init__(self, runner: Runner) -> None:
        self.name = runner.name
        self._runner = runner

    def __enter__(self) -> Self:
        """Load the model; see ``Runner``."""
        self._runner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Free the model."""
        self._runner.__exit__(kind, error, trace)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, each row under its own task."""
        ids = inputs[TASK_IDS]
        joined: dict[str, Array] = {}
        for task in np.unique(ids):
            rows = np.flatnonzero(ids == task)
            own = {name: value[rows] for name, value in inputs.items()}
            own[TASK_IDS] = np.array([task], np.int64)
            for name, values in self._runner.infer(own).items():
                shape = (len(ids), *values.shape[1:])
                joined.setdefault(name, np.empty(shape, values.dtype))[rows] = values
        return joined
