"""Which task each row of the batch belongs to, told to every adapted layer at once.

transformers models do not pass ``task_ids`` on to their linear layers, so the
layers of one model share a ``TaskRouting`` that is set before each forward pass.
"""

from __future__ import annotations

import torch


class TaskRouting:
    """The task ids of the batch in flight."""

    def __init__(self) -> None:
        self._task_ids: torch.Tensor | None = None

    def set(self, task_ids: torch.Tensor) -> None:
        """Set the ids, int64 ``[B]``, for the next forward pass."""
        if task_ids.ndim != 1 or task_ids.dtype != torch.int64:
            raise ValueError(
                f"task_ids must be int64 [batch], not {task_ids.dtype} {task_ids.shape}"
            )
        self._task_ids = task_ids

    def rows(self, row_count: int) -> torch.Tensor:
        """Return one id per row, int64 ``[row_count]``.

        A batch of one task may come in rows of any number and order. In others, a layer that
        sees ``[batch * m, ...]`` rows, batch-major, gets each id m times.
        """
        if self._task_ids is None:
            raise ValueError("task_ids were not set before the forward pass")
        batch = self._task_ids.shape[0]
        if row_count == batch:
            return self._task_ids
        if bool((self._task_ids == self._task_ids[0]).all()):
            return self._task_ids[:1].expand(row_count)
        if row_count % batch:
            raise ValueError(f"{row_count} rows cannot be split over a batch of {batch}")
        return self._task_ids.repeat_interleave(row_count // batch)
