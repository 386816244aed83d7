"""Faults that no comparison of one batch with the oracle needs to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.cases import MIXED, Case
from mtl_export.parity.checks.rows import row_cells
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell
from tests.parity.fakes import TASKS, Answer, FakeRunner, exact, judged_by, right_for

Fault = Callable[[Mapping[str, Array], Array], Array]


def answering(fault: Fault) -> Answer:
    """Return a single graph whose logits ``fault`` spoils, given the inputs."""
    return lambda inputs: {"logits": fault(inputs, exact(inputs))}


def judged(cases: list[Case], answer: Answer, task: int | None = None) -> dict[str, Cell]:
    """Return the cells by check."""
    mixed = next(case for case in cases if case.name == MIXED)
    with FakeRunner(answer) as runner:
        reference = Reference(mixed, Subject("logits"), exact(mixed.inputs), mixed.name)
        cells = row_cells(judged_by(runner, reference, task=task))
    return {cell.case: cell for cell in cells}


def test_rows_that_keep_to_themselves_pass(cases: list[Case], bound: BoundModel) -> None:
    """Single graph and merged artefacts; also with errors as large as they may be."""
    assert len(bound.adapters.tasks) == len(TASKS)
    for cells in (
        judged(cases, lambda inputs: {"logits": exact(inputs)}),
        judged(cases, right_for(1), task=1),
        judged(cases, answering(lambda i, y: y + 0.9e-6 * (-1.0) ** len(i["input_ids"]))),
    ):
        assert set(cells) == {
            "rows permuted", "rows one by one", "padded further", "beside padding only"
        }  # fmt: skip
        assert {cell.verdict for cell in cells.values()} == {"passed"}


def spoiled_by_padding(inputs: Mapping[str, Array], logits: Array) -> Array:
    """Return NaN everywhere if one row is padding only: a softmax over nothing, then a mean."""
    return logits + (np.nan if not inputs["attention_mask"].any(axis=1).all() else 0.0)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (lambda i, y: y + 1e-3 * np.arange(len(y))[:, None], "rows permuted"),
        (lambda i, y: y + 1e-3 * len(y), "rows one by one"),
        (lambda i, y: y if len(y) > 1 else y[:, :0], "rows one by one"),
        (lambda i, y: y + 1e-4 * i["input_ids"].shape[1], "padded further"),
        (spoiled_by_padding, "beside padding only"),
    ],
)
def test_a_row_that_depends_on_its_batch_fails(cases: list[Case], fault: Fault, check: str) -> None:
    """Each fault fails the check that is there for it."""
    assert judged(cases, answering(fault))[check].verdict == "failed"


def test_a_missing_output_is_no_pass(cases: list[Case]) -> None:
    """There is nothing to permute."""
    cells = judged(cases, lambda inputs: {"scores": exact(inputs)})
    assert [cell.verdict for cell in cells.values()] == ["failed"]
    assert "logits is missing" in next(iter(cells.values())).reason
