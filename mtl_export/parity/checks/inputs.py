"""What must hold of inputs that nobody should give.

    task ids of a wrong kind   another dtype or rank is refused, or gives NaN alone
    padding only               NaN where the oracle answers NaN, and nowhere else

T tasks, B rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, MtlExportError
from mtl_export.names import TASK_IDS
from mtl_export.parity.cases import Case
from mtl_export.parity.presets import PADDING_ONLY
from mtl_export.parity.probes import Padding, rows_of_padding
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.base import Runner

WRONG_KIND = "task ids of a wrong kind"


def wrong_kind_cell(cell: Cell, runner: Runner, case: Case, output: str) -> Cell:
    """Return the cell that says whether ids that are no int64 [B] are kept from answering."""
    cell = replace(cell, case=WRONG_KIND)
    ids = case.task_ids
    wrong: dict[str, Array] = {
        "int32": ids.astype(np.int32),
        "float32": ids.astype(np.float32),
        "a column": ids[:, None],
        "a number": np.array(ids[0]),
    }
    answered = []
    for name, value in wrong.items():
        try:
            found = runner.infer({**case.inputs, TASK_IDS: value}).get(output)
        except BackendMissingError:
            raise
        except MtlExportError:
            continue
        if found is None or not np.isnan(found).all():
            answered.append(name)
    if not answered:
        return cell
    return replace(
        cell, verdict="failed", reason=f"ids that are {', '.join(answered)} are answered"
    )


def padding_only_cells(
    cell: Cell, runner: Runner, padding: Padding, task: Task | None
) -> list[Cell]:
    """Return the cell that says whether rows of padding answer NaN as the oracle does."""
    cell = replace(cell, case=PADDING_ONLY)
    inputs, own = rows_of_padding(padding, None if task is None else task.index)
    if not own.any():
        return []
    outputs = runner.infer(inputs)
    problems = []
    for name, is_nan in padding.is_nan.items():
        found, expected = outputs.get(name), is_nan[own]
        if found is None or found.ndim != 2 or len(found) != len(expected):
            problems.append(f"no {name} of one row each")
            continue
        # A merged model is as wide as its task, the oracle as the widest.
        width = min(found.shape[1], expected.shape[1])
        differ = np.flatnonzero((np.isnan(found)[:, :width] != expected[:, :width]).any(axis=1))
        if differ.size:
            says = "numbers" if expected[differ[0]].any() else "NaN"
            problems.append(f"{name} is {says} in rows {differ.tolist()}, the oracle's is not")
    if not problems:
        return [cell]
    return [replace(cell, verdict="failed", reason="; ".join(problems))]
