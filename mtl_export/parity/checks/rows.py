"""What must hold whatever the numbers are: a row's answer is its own.

    bad task ids         unknown ids are refused, or give NaN in their own rows
    neighbours change task  a row is the same, bit for bit, whatever the others' tasks are
    rows permuted        the answers are permuted, and nothing else
    rows one by one      each row alone answers as it does among others
    padded further       more padding changes nothing          (inputs with an attention mask)
    beside padding only  a row that is padding only spoils none (likewise)

The artefact is compared with itself, so these hold without an oracle. Batches of other
sizes and lengths are summed in another order: each side may be off by what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, MtlExportError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS
from mtl_export.parity.cases import Case
from mtl_export.parity.outputs import answers
from mtl_export.parity.presets import FURTHER, NOTHING, ONE_BY_ONE
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS

MORE_PADDING = 3
Infer = Callable[[Mapping[str, Array]], Array | None]


def row_cells(
    cell: Cell,
    runner: Runner,
    reference: Reference,
    task: Task | None,
    limit: float,
    left_out: Collection[str] = NOTHING,
) -> list[Cell]:
    """Return one cell for each check that is not left out.

    Args:
        cell: Says whose they are.
        runner: The artefact, open.
        reference: One output for a batch of mixed tasks; its last dimension may differ.
        task: The task of a merged artefact: its rows are taken, and no ``task_ids``.
        limit: Largest error that an artefact may have against the oracle.
        left_out: Checks not to run.
    """
    case, subject = reference.case, reference.subject
    output = subject.output if task is None else subject.merged_output
    if task is not None:
        case = Case(case.name, case.rows(case.task_ids == task.index))

    def infer(inputs: Mapping[str, Array]) -> Array | None:
        given = {n: v for n, v in inputs.items() if task is None or n != TASK_IDS}
        return runner.infer(given).get(output)

    whole = infer(case.inputs)
    expected = (len(case.task_ids), *reference.logits.shape[1:])
    if whole is None or (whole.ndim, whole.shape[:-1]) != (len(expected), expected[:-1]):
        found = "is missing" if whole is None else f"has shape {list(whole.shape)}"
        reason = f"{output} {found}, not {list(expected)}"
        return [replace(cell, case="rows", verdict="failed", reason=reason)]
    checks: dict[str, Callable[[Case, Infer, Array], float]] = {
        "rows permuted": _permuted,
        ONE_BY_ONE: _alone,
    }
    if {INPUT_IDS, ATTENTION_MASK} <= case.inputs.keys():
        checks |= {FURTHER: _padded, "beside padding only": _beside_padding}
    return [
        _cell(replace(cell, case=name), check(case, infer, whole), 2 * limit)
        for name, check in checks.items()
        if name not in left_out
    ]


def bad_ids_cell(
    cell: Cell, runner: Runner, case: Case, output: str, shape: tuple[int, ...], bad: Array
) -> Cell:
    """Return the cell that says whether unknown ids are kept from answering.

    Args:
        cell: Says whose it is; ``passed``.
        runner: A single graph, open.
        case: Its first row is asked, under its own id and under every bad one.
        output: Which output is looked at.
        shape: Of one row of it.
        bad: Ids that no task has, int64.
    """
    cell = replace(cell, case="bad task ids")
    good = case.rows(np.arange(len(case.task_ids)) == 0)
    inputs = {name: np.repeat(value, len(bad) + 1, axis=0) for name, value in good.items()}
    inputs[TASK_IDS] = np.concatenate([good[TASK_IDS], bad])
    try:
        logits = runner.infer(inputs).get(output)
    except BackendMissingError:
        raise
    except MtlExportError:
        return cell  # refusing the whole batch is as good as poisoning the rows
    expected = (len(bad) + 1, *shape)
    if logits is None or logits.shape != expected:
        found = "is missing" if logits is None else f"has shape {list(logits.shape)}"
        reason = f"{output} {found}, not {list(expected)}"
    elif np.isnan(logits[0]).any():
        reason = "they spoil the good row beside them"
    elif not np.isnan(logits[1:]).all():
        silent = np.isnan(logits[1:]).reshape(len(bad), -1).all(axis=1)
        reason = f"ids {bad[~silent].tolist()} are answered"
    else:
        return cell
    return replace(cell, verdict="failed", reason=reason)


def isolation_cell(cell: Cell, runner: Runner, case: Case, output: str, task_count: int) -> Cell:
    """Return the cell that says whether a row is the same whatever tasks its neighbours have."""
    cell = replace(cell, case="neighbours change task")
    before = runner.infer(case.inputs).get(output)
    if before is None:
        return replace(cell, verdict="failed", reason=f"no output {output!r}")
    disturbed = []
    for row in range(min(len(before), task_count)):
        ids = (case.task_ids + 1) % task_count
        ids[row] = case.task_ids[row]
        after = runner.infer({**case.inputs, TASK_IDS: ids})[output]
        if not np.array_equal(after[row], before[row]):
            disturbed.append(row)
    if task_count == 1 or not disturbed:
        return cell
    reason = f"rows {disturbed} change bit for bit when the other rows' tasks do"
    return replace(cell, verdict="failed", reason=reason)


def _permuted(case: Case, infer: Infer, whole: Array) -> float:
    order = np.roll(np.arange(len(whole))[::-1], 1)
    moved = Case(case.name, {name: value[order] for name, value in case.inputs.items()})
    back = np.argsort(order)
    found = infer(moved.inputs)
    return _error(case, whole, None if found is None else found[back])


def _alone(case: Case, infer: Infer, whole: Array) -> float:
    parts = [
        infer({name: value[row : row + 1] for name, value in case.inputs.items()})
        for row in range(len(whole))
    ]
    there = [part for part in parts if part is not None]
    return _error(case, whole, np.concatenate(there) if len(there) == len(parts) else None)


def _padded(case: Case, infer: Infer, whole: Array) -> float:
    shape = case.inputs[ATTENTION_MASK].shape
    wider = {
        name: np.pad(value, ((0, 0), (0, MORE_PADDING)))
        if name != NEW_TOKENS and value.shape == shape
        else value
        for name, value in case.inputs.items()
    }
    found = infer(wider)
    if found is not None and whole.ndim > 2:
        found = found[:, : whole.shape[1]]
    return _error(case, whole, found)


def _beside_padding(case: Case, infer: Infer, whole: Array) -> float:
    more = {name: np.concatenate([value, value[:1]]) for name, value in case.inputs.items()}
    more[ATTENTION_MASK][-1] = 0
    found = infer(more)
    return _error(case, whole, None if found is None else found[: len(whole)])


def _error(case: Case, whole: Array, found: Array | None) -> float:
    """Return the largest difference, Inf where shapes or what is finite differ."""
    if found is None or found.shape != whole.shape:
        return float("inf")
    rows = np.ones(len(whole), np.bool_)
    left, right = answers(case, rows, whole), answers(case, rows, found)
    finite = np.isfinite(left)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return float("inf")
    difference = np.abs(right[finite] - left[finite])
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))


def _cell(cell: Cell, error: float, limit: float) -> Cell:
    judged = replace(cell, max_abs_error=error if np.isfinite(error) else None, limit=limit)
    if error <= limit:
        return replace(judged, verdict="passed")
    size = f"by {error:.3g}; allowed {limit:.3g}" if np.isfinite(error) else "in shape or to NaN"
    return replace(judged, verdict="failed", reason=f"answers change {size}")
