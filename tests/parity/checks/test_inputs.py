"""Inputs that nobody should give: ids of a wrong kind, and rows of nothing but padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from typing_extensions import Self

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.parity.cases import MIXED, PADDING_ONLY, ZEROED, Case
from mtl_export.parity.checks.rows import WRONG_KIND, padding_only_cells, routing_cells
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import (
    ExtraChecks,
    Padding,
    Reference,
    padding_of,
    with_zeroed,
)
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.base import Runner
from tests.parity.fakes import TASKS, WIDEST, WIDTHS, Answer, FakeRunner, exact, judged_by


class Careless:
    """A runner that takes ids of any kind, and answers by a function."""

    name = "careless"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __enter__(self) -> Self:
        """Open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one batch."""
        return self._answer(inputs)


def mixed(cases: list[Case]) -> Case:
    """Return the batch of all tasks."""
    return next(case for case in cases if case.name == MIXED)


def test_ids_of_a_wrong_kind_must_not_be_answered(cases: list[Case]) -> None:
    """Each dtype and rank that looks like an answer is named; refusals and NaN are as good."""

    def numbers(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"logits": np.zeros((len(inputs["input_ids"]), WIDEST))}

    def strict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs["task_ids"].dtype != np.int64:
            raise EngineRunError("task_ids: int32", expected="int64")
        return {"logits": np.full((3, 2), np.nan)}

    case = mixed(cases)
    reference = Reference(case, Subject("logits"), exact(case.inputs), case.name)

    def judged(runner: Runner) -> Cell:
        cells = routing_cells(judged_by(runner, reference))
        return next(cell for cell in cells if cell.case == WRONG_KIND)

    cell = judged(Careless(numbers))
    assert cell.verdict == "failed"
    assert cell.reason == "ids that are int32, float32, a column, a number are answered"
    assert judged(Careless(strict)).verdict == "passed"
    with FakeRunner(lambda inputs: {"logits": exact(inputs)}) as runner:
        assert judged(runner).verdict == "passed"


def on_padding(value: float) -> Answer:
    """Answer rows without a token with ``value``, others as they should be."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        ids = inputs.get("task_ids", np.zeros(len(inputs["input_ids"]), np.int64))
        logits = exact({**inputs, "task_ids": ids})
        return {
            "logits": np.where(inputs["attention_mask"].any(axis=1, keepdims=True), logits, value)
        }

    return answer


def padding(cases: list[Case], value: float) -> Padding:
    """Return what an oracle that answers padding with ``value`` says."""
    case = mixed(cases)
    reference = Reference(case, Subject("logits"), exact(case.inputs), case.name)
    with FakeRunner(on_padding(value)) as oracle:
        found = padding_of(oracle, [reference])
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("oracle", "candidate", "verdict"),
    [(0.5, 0.25, "passed"), (np.nan, np.nan, "passed"), (0.5, np.nan, "failed"),
     (np.nan, 0.5, "failed")],
)  # fmt: skip
def test_padding_alone_is_nan_where_the_oracle_says_so(
    cases: list[Case], oracle: float, candidate: float, verdict: str
) -> None:
    """Its numbers mean nothing; whether there are any must agree."""
    asked_for = padding(cases, oracle)
    assert len(asked_for.inputs["task_ids"]) == len(TASKS)
    extra = ExtraChecks(padding=asked_for)
    with FakeRunner(on_padding(candidate)) as runner:
        (cell,) = padding_only_cells(replace(judged_by(runner), extra=extra))
        assert (cell.case, cell.verdict) == (PADDING_ONLY, verdict)
    narrow = Careless(lambda inputs: {"logits": on_padding(candidate)(inputs)["logits"][:, :1]})
    of_task = replace(judged_by(narrow, task=2), extra=extra).of_tasks([2])
    (cell,) = padding_only_cells(of_task)
    assert WIDTHS[2] == 1
    assert cell.verdict == verdict


def test_what_cannot_be_asked_of_the_base_is_said(cases: list[Case]) -> None:
    """The reason why there is no model without adapters ends up beside what is left out."""
    case = mixed(cases)
    reference = Reference(case, Subject("logits"), exact(case.inputs), case.name)
    found = with_zeroed(ExtraChecks({"x": "y"}), [reference], "biases of their own")
    assert found.left_out == {ZEROED: "biases of their own", "x": "y"}
    base = FakeRunner(lambda inputs: {"logits": exact(inputs) + 1})
    zeroed = with_zeroed(ExtraChecks(), [reference], {"fp64": base}.__getitem__).zeroed
    np.testing.assert_array_equal(zeroed["logits"], exact(case.inputs) + 1)
