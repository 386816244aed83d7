from __future__ import annotations

import pytest
import torch

from mtl_export.adapters.modules.routing import TaskRouting


def test_one_id_per_row() -> None:
    """As many rows as ids get the ids as they are."""
    routing = TaskRouting()
    routing.set(torch.tensor([2, 0, 1]))
    assert routing.rows(3).tolist() == [2, 0, 1]


def test_more_rows_than_ids_repeat_each_id_in_place() -> None:
    """Rows of windows or beams are batch-major: each id is repeated, not the batch."""
    routing = TaskRouting()
    routing.set(torch.tensor([2, 0]))
    assert routing.rows(6).tolist() == [2, 2, 2, 0, 0, 0]


def test_rows_that_cannot_be_split_are_refused() -> None:
    """Seven rows of a batch of two belong to nobody."""
    routing = TaskRouting()
    routing.set(torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="7 rows cannot be split over a batch of 2"):
        routing.rows(7)


def test_ids_must_be_set_first() -> None:
    """A forward pass without ids is a bug, not task 0."""
    with pytest.raises(ValueError, match="not set"):
        TaskRouting().rows(1)


@pytest.mark.parametrize("ids", [torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor(0)])
def test_ids_of_another_type_or_shape_are_refused(ids: torch.Tensor) -> None:
    """task_ids is int64 [batch] and nothing else."""
    with pytest.raises(ValueError, match=r"int64 \[batch\]"):
        TaskRouting().set(ids)
