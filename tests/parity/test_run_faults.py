from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, ParityError
from mtl_export.parity.cases import Case
from mtl_export.parity.judged import BAD_IDS
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import Tolerance
from tests.parity.fakes import (
    ERROR,
    TASKS,
    WIDEST,
    Answer,
    FakeRunner,
    exact,
    failed,
    judge,
    merged,
    right,
    right_for,
    single,
)


def broken(case: str) -> Answer:
    """Return a single graph with one fault."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        ids = inputs["task_ids"]
        faults: dict[str, Callable[[], Array]] = {
            "renamed": lambda: logits,
            "fewer rows": lambda: logits[:1],
            "more rows": lambda: np.concatenate([logits, logits]),
            "frozen batch": lambda: np.resize(logits, (3, WIDEST)),
            "narrower": lambda: logits[:, :-1],
            "wider": lambda: np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf),
            "transposed": lambda: logits.T.copy(),
            "flat": lambda: logits.ravel(),
            "one more dimension": lambda: logits[:, None],
            "nan": lambda: np.where(np.arange(WIDEST) == 0, np.nan, logits),
            "inf": lambda: np.where(np.arange(WIDEST) == 0, np.inf, logits),
            "-inf": lambda: np.where(np.arange(WIDEST) == 0, -np.inf, logits),
            "all nan": lambda: np.full_like(logits, np.nan),
            "no label answers": lambda: np.where(np.isneginf(logits), 0.0, logits),
            "no label nan": lambda: np.where(np.isneginf(logits), np.nan, logits),
            "no label +inf": lambda: np.where(np.isneginf(logits), np.inf, logits),
            "no label very low": lambda: np.where(np.isneginf(logits), -1e30, logits),
            "tasks swapped": lambda: exact({**inputs, "task_ids": (ids + 1) % 3}),
            "first id for all": lambda: exact({**inputs, "task_ids": np.resize(ids[:1], len(ids))}),
            "routing frozen": lambda: exact({**inputs, "task_ids": np.arange(len(ids)) % 3}),
            "rows swapped": lambda: logits[::-1],
            "zeros": lambda: np.where(np.isfinite(logits), 0.0, logits),
        }
        return {"scores" if case == "renamed" else "logits": faults[case]()}

    return answer


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("renamed", "no output 'logits'"),
        ("fewer rows", "has shape [1, 4]"),
        ("more rows", "has shape"),
        ("frozen batch", "has shape [3, 4]"),
        ("narrower", "3], not"),
        ("wider", "5], not"),
        ("transposed", "has shape [4, "),
        ("flat", "has shape"),
        ("one more dimension", "1, 4], not"),
        ("nan", "values are NaN or Inf"),
        ("inf", "values are NaN or Inf"),
        ("-inf", "values are NaN or Inf"),
        ("all nan", "columns 2 and up answer"),
        ("no label answers", "columns 2 and up answer, but the task has 2 labels"),
        ("no label nan", "columns 2 and up answer"),
        ("no label +inf", "columns 1 and up answer"),
        ("no label very low", "columns 1 and up answer"),
        ("tasks swapped", ""),
        ("first id for all", ""),
        ("routing frozen", ""),
        ("rows swapped", "error"),
        ("zeros", "error"),
    ],
)
def test_a_broken_single_graph_fails(
    bound: BoundModel, cases: list[Case], fault: str, reason: str
) -> None:
    """No fault of shape, value, column or routing passes, even under the widest tolerance."""
    report = judge(bound, cases, single(bound, broken(fault)))
    assert report.verdict == "failed"
    assert any(reason in cell.reason for cell in failed(report))
    assert all(cell.reason for cell in failed(report))
    if reason not in ("", "error"):
        wide = Tolerance(atol=1e9, rtol=1e9)
        report = judge(bound, cases, single(bound, broken(fault)), tolerance=wide)
        assert any(reason in cell.reason for cell in failed(report))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda inputs: {}, "no output 'logits'"),
        (lambda inputs: {"logits": right_for(0)(inputs)["logits"][:1]}, "has shape [1, 2]"),
        (
            lambda inputs: {
                "logits": np.pad(
                    right_for(0)(inputs)["logits"], ((0, 0), (0, 2)), constant_values=-np.inf
                )
            },
            "4], not",
        ),
        (lambda inputs: {"logits": right_for(0)(inputs)["logits"] * np.nan}, "NaN or Inf"),
        (lambda inputs: {"logits": right_for(1)(inputs)["logits"][:, :2]}, "error"),
    ],
    ids=["no output", "frozen batch", "widest width", "nan", "another task"],
)
def test_a_broken_merged_artefact_fails(
    bound: BoundModel, cases: list[Case], answer: Answer, reason: str
) -> None:
    """A merged artefact must have its own task's numbers, width and rows."""
    report = judge(bound, cases, merged(bound, 0, answer))
    assert report.verdict == "failed"
    assert any(reason in cell.reason for cell in failed(report))


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("checkpoint_sha256", "d" * 64, "checkpoint"),
        ("checkpoint_sha256", "", "checkpoint"),
        ("base_sha256", "d" * 64, "base"),
        ("base_sha256", "", "base"),
    ],
)
def test_a_stale_artefact_fails_without_being_run(
    bound: BoundModel, cases: list[Case], field: str, value: str, word: str
) -> None:
    """What was made from another checkpoint or base fails even if its numbers agree."""
    artefact = single(bound, right)
    stale = replace(
        artefact,
        checkpoint_sha256=value if field == "checkpoint_sha256" else artefact.checkpoint_sha256,
        base_sha256=value if field == "base_sha256" else artefact.base_sha256,
    )
    report = judge(bound, cases, stale)
    (cell,) = report.cells
    assert report.verdict == cell.verdict == "failed"
    assert f"not from this {word}" in cell.reason
    assert (value[:12] or "an unknown one") in cell.reason
    assert isinstance(stale.runner, FakeRunner)
    assert not stale.runner.asked


def on_bad_ids(change: Callable[[Array, Array], Array]) -> Answer:
    """Return a right graph that ``change(logits, task_ids)`` spoils when an id is unknown."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits, ids = right(inputs)["logits"], inputs["task_ids"]
        is_bad = (ids < 0) | (ids >= len(TASKS))
        return {"logits": change(logits, ids) if is_bad.any() else logits}

    return answer


def refuse_all(logits: Array, ids: Array) -> Array:
    """Refuse the batch as a host-side check does."""
    raise EngineRunError("task_ids: 9", expected="0 to 2", fix="Correct it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # TensorRT's Gather gives zeros, so the base model answers.
        (lambda logits, ids: np.nan_to_num(logits, nan=0.5), "are answered"),
        # An id that wraps to 1 in 32 bits is answered, the others are not.
        (
            lambda logits, ids: np.where((ids == 2**32 + 1)[:, None], 0.25, logits),
            f"ids [{2**32 + 1}] are answered",
        ),
        # T itself: the guard is off by one.
        (lambda logits, ids: np.where((ids == 3)[:, None], 0.25, logits), "ids [3] are answered"),
        (lambda logits, ids: np.where((ids == -1)[:, None], 0.25, logits), "ids [-1] are answered"),
        # One column of a bad row looks like an answer.
        (
            lambda logits, ids: np.where(np.arange(WIDEST) == 2, 0.25, logits),
            "are answered",
        ),
        (lambda logits, ids: logits * np.nan, "spoil the good row"),
        (lambda logits, ids: logits[:1], "has shape [1, 4], not [5, 4]"),
        (lambda logits, ids: logits[:, :1], "has shape [5, 1], not [5, 4]"),
    ],
    ids=["base answers", "32 bits", "off by one", "negative", "one column", "spoilt", "rows",
         "columns"],
)  # fmt: skip
def test_bad_task_ids_must_not_be_answered(
    bound: BoundModel, cases: list[Case], change: Callable[[Array, Array], Array], reason: str
) -> None:
    """A row with an unknown id that looks like an answer fails the single graph."""
    assert set(BAD_IDS) == {-1, 2**32 + 1, 2**63 - 1}
    report = judge(bound, cases, single(bound, on_bad_ids(change)))
    (cell,) = failed(report)
    assert cell.case == "bad task ids"
    assert reason in cell.reason


def test_refusing_bad_task_ids_is_as_good(bound: BoundModel, cases: list[Case]) -> None:
    """A runner that refuses the whole batch never answers a bad id."""
    assert judge(bound, cases, single(bound, on_bad_ids(refuse_all))).verdict == "passed"


def test_no_output_for_bad_ids_fails(bound: BoundModel, cases: list[Case]) -> None:
    """An output that is missing there is missing."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {} if (inputs["task_ids"] < 0).any() else right(inputs)

    (cell,) = failed(judge(bound, cases, single(bound, answer)))
    assert cell.reason == "logits is missing, not [5, 4]"


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_oracle_that_is_not_finite_compares_nothing(
    bound: BoundModel, cases: list[Case], dtype: str, bad: float
) -> None:
    """NaN or Inf in the reference or its floor would let anything pass: an error instead."""

    def spoilt(asked: str) -> FakeRunner:
        def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
            logits = exact(inputs) + ERROR[asked]
            if asked == dtype:
                logits[inputs["task_ids"] == 1, 2] = bad
            return {"logits": logits}

        return FakeRunner(answer)

    with pytest.raises(ParityError) as caught:
        run_parity(bound, [single(bound, right)], cases, tolerance=Tolerance(), oracle=spoilt)
    assert dtype in caught.value.problem
    assert "task b" in caught.value.problem
    assert "NaN or Inf" in caught.value.problem
    assert caught.value.fix
