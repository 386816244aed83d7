"""Three gates on the same artefact and the same inputs: ours, Polygraphy's, ``np.allclose``.

Ours is the command line in this process: its exit code and what it prints. The other two
compare what the oracle and the artefact answer to the very cases that ours made, padding
left out; whatever raises counts as caught.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.parity import run as parity
from mtl_export.parity.outputs import answers
from mtl_export.parity.tolerance import FLOOR_FACTOR
from tests.benchmarks.gate.fault import FAILED, Fault
from tests.benchmarks.gate.project import Project

ATOL = 1e-5
CAUGHT, MISSED, NOT_RUN = "caught", "MISSED", "not-run"
Pairs = list[tuple[str, Array, Array | None]]


@dataclass(frozen=True)
class Outcome:
    """What ``mtl-export parity`` said.

    Attributes:
        code: Its exit code.
        lines: What it printed, a line a failure.
        asked: ``run_parity``'s arguments, None if it came to none.
        floors: The largest error of all cells, in noise floors.
    """

    code: int
    lines: tuple[str, ...]
    asked: dict[str, Any] | None
    floors: float = 0.0


def judge(project: Project) -> Outcome:
    """Return what the command line says of a project."""
    asked: dict[str, Any] = {}
    shares: list[float] = []
    original = parity.run_parity

    def recorded(*given: Any, **named: Any) -> Any:
        asked.update(zip(("bound", "artefacts", "cases"), given, strict=False), **named)
        report = original(*given, **named)
        shares.extend(
            cell.max_abs_error / cell.limit
            for cell in report.cells
            if cell.max_abs_error is not None and cell.limit
        )
        return report

    with patch.object(parity, "run_parity", recorded):
        result = project.run("parity", "--threads", "1")
    if result.exit_code == 1:
        raise AssertionError(result.output) from result.exception
    text = result.output.splitlines()
    lines = [line for line in text if line.startswith(("FAILED", "error"))]
    floors = FLOOR_FACTOR * max(shares, default=0.0)
    return Outcome(result.exit_code, tuple(lines), asked or None, floors)


def verdict(fault: Fault, outcome: Outcome) -> tuple[str, str]:
    """Return ``caught`` or ``MISSED``, and the line that says where, or what was wrong."""
    if outcome.code != fault.code:
        return MISSED, f"exit code {outcome.code}, not {fault.code}"
    if fault.code == FAILED and fault.artefact:
        other = [line for line in outcome.lines if not line.startswith(f"FAILED {fault.artefact}")]
        if other:
            return MISSED, f"blames another artefact: {other[0]}"
    right = [line for line in outcome.lines if re.search(fault.where, line)]
    if not right:
        return MISSED, f"no line says where; the first: {(outcome.lines or ('',))[0]}"
    return CAUGHT, right[0].removeprefix("FAILED ")


def compared(outcome: Outcome, artefact_name: str) -> Iterator[Pairs]:
    """Yield, for each case, what the oracle and the artefacts of that name answer.

    Raises:
        Exception: Whatever a runtime says of a broken artefact.
    """
    assert outcome.asked is not None
    with outcome.asked["oracle"]("fp64") as oracle:
        exact = [oracle.infer(case.inputs) for case in outcome.asked["cases"]]
    for artefact in outcome.asked["artefacts"]:
        if artefact_name in ("", artefact.name):
            with artefact.runner as runner:
                for case, wanted in zip(outcome.asked["cases"], exact, strict=True):
                    yield _pairs(artefact, runner, case, wanted)


def _pairs(artefact: Any, runner: Any, case: Any, wanted: dict[str, Array]) -> Pairs:
    rows = np.ones(len(case.task_ids), np.bool_)
    if artefact.task is not None:
        rows = case.task_ids == artefact.task.index
        if not rows.any():
            return []
        own = type(case)(case.name, case.rows(rows))
        given = {name: value for name, value in own.inputs.items() if name != "task_ids"}
        width = len(artefact.task.labels) or None
        wanted = {name: value[rows][..., :width] for name, value in wanted.items()}
        case, rows = own, np.ones(int(rows.sum()), np.bool_)
    else:
        given = dict(case.inputs)
    found = runner.infer(given)
    pairs: Pairs = []
    for name in found.keys() | {"logits"}:
        if name in wanted:
            right = answers(case, rows, wanted[name])
            left = found.get(name)
            fits = left is not None and left.shape[:-1] == wanted[name].shape[:-1]
            pairs.append(
                (name, right, answers(case, rows, left) if fits and left is not None else left)
            )
    return pairs


def allclose(outcome: Outcome, artefact: str) -> str:
    """Return whether ``np.allclose`` with ``ATOL`` and numpy's own rtol sees a difference."""

    def differs(pairs: Pairs) -> bool:
        return any(
            left is None or left.shape != right.shape or not np.allclose(left, right, atol=ATOL)
            for _, right, left in pairs
        )

    return _gate(outcome, artefact, differs)


def polygraphy(outcome: Outcome, artefact: str) -> str:
    """Return whether Polygraphy's comparison, as it is set by default, sees a difference."""
    if find_spec("polygraphy") is None:
        return NOT_RUN
    logger: Any = import_module("polygraphy.logger").G_LOGGER
    logger.module_severity = logger.CRITICAL
    theirs: Any = import_module("polygraphy.comparator")

    def differs(pairs: Pairs) -> bool:
        right, left = {}, {}
        for name, wanted, found in pairs:
            # -inf - -inf is NaN, which it takes for a difference.
            absent = np.isneginf(wanted)
            right[name] = np.where(absent, 0.0, wanted).astype(np.float32)
            if found is not None:
                same = absent & np.isneginf(found) if found.shape == wanted.shape else False
                left[name] = np.where(same, 0.0, found).astype(np.float32)
        results = theirs.RunResults([
            ("oracle", [theirs.IterationResult(right, runner_name="oracle")]),
            ("artefact", [theirs.IterationResult(left, runner_name="artefact")]),
        ])  # fmt: skip
        return not theirs.Comparator.compare_accuracy(
            results, compare_func=theirs.CompareFunc.simple()
        )

    return _gate(outcome, artefact, differs)


def _gate(outcome: Outcome, artefact: str, differs: Callable[[Pairs], bool]) -> str:
    if outcome.asked is None:
        return CAUGHT  # the base or the checkpoint could not be opened: nothing to compare
    try:
        return CAUGHT if any(differs(pairs) for pairs in compared(outcome, artefact)) else MISSED
    except Exception:
        # Whatever stops a peer stops a build as well: that counts for it.
        return CAUGHT
