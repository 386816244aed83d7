"""One case of one artefact against the oracle: a cell for each task and output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.judged import Judged
from mtl_export.parity.metrics import Decisions, decisions, difference, ranking, top_labels
from mtl_export.parity.outputs import answers
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell

# Tokens that sampling usually chooses from.
TOP = 5


def compare_case(
    judged: Judged, references: Sequence[Reference], outputs: Mapping[str, Array]
) -> list[Cell]:
    """Return one cell for each task that the artefact serves in a case, and each output.

    Args:
        judged: The artefact.
        references: The oracle's answers to the case, one for each output.
        outputs: The artefact's answers to it, by name.
    """
    cells = []
    for one in references:
        for task in judged.tasks:
            rows = one.case.task_ids == task.index
            if not (rows.any() and one.subject.serves(task)):
                continue
            cell = _compare(judged, one, task, outputs.get(judged.output(one)))
            if cell.verdict == "passed" and one.subject.tasks and judged.artefact.task is None:
                cell = _without_other_answers(cell, one, outputs, rows)
            cells.append(cell)
    return cells


def _without_other_answers(
    cell: Cell, wanted: Reference, outputs: Mapping[str, Array], rows: Array
) -> Cell:
    """Return a passed cell, failed if outputs but the task's own answer in its rows."""
    own = wanted.subject.output
    others = [n for n, v in outputs.items() if n != own and not np.isneginf(v[rows]).all()]
    reason = f"answers in {', '.join(others)} too, but {own} is the task's output" if others else ""
    return replace(cell, verdict="failed", reason=reason) if others else cell


def _compare(judged: Judged, wanted: Reference, task: Task, candidate: Array | None) -> Cell:
    """Return the cell for the task's rows.

    The reference is [B, widest], or [B, S, widest] where every token has its own logits.
    """
    artefact, floor = judged.artefact, judged.floors[wanted.subject]
    case, output, reference = wanted.case, wanted.subject.output, wanted.logits
    cell = replace(artefact.cell(task.name, wanted.title), noise_floor=floor)
    rows = case.task_ids == task.index
    if candidate is None:
        return cell.judged(cell.case, f"no output {output!r}")
    axis = 1 if reference.ndim > 3 else -1  # of maps, labels stand before height and width
    labels = wanted.subject.columns(task, int(rows.sum())) or reference.shape[axis]
    shape = list(reference.shape)
    shape[axis] = reference.shape[axis] if artefact.task is None else labels
    expected = [len(rows), *shape[1:]]
    if list(candidate.shape) != expected:
        return cell.judged(cell.case, f"{output} has shape {list(candidate.shape)}, not {expected}")
    reference, candidate = answers(case, rows, reference), answers(case, rows, candidate)
    if not np.isneginf(candidate[:, labels:]).all():
        reason = f"columns {labels} and up answer, but the task has {labels} labels"
        return cell.judged(cell.case, reason)
    own_reference, own = reference[:, :labels], candidate[:, :labels]
    if not np.isfinite(own).all():
        return cell.judged(cell.case, f"{int((~np.isfinite(own)).sum())} values are NaN or Inf")
    tolerance = judged.tolerance.of(output)
    allowed = tolerance.allowed(own_reference, floor)
    worst = difference(own_reference, own, allowed)
    limit = float(allowed[worst.index])
    # A wide --atol must not make every flip a tie: only what the noise floor explains is one.
    tie = min(limit, tolerance.factor * floor)
    decided = wanted.subject.decides
    agreed = _decided(own_reference, own, task, tie) if decided else Decisions(0, 0, 0)
    reason = ""
    if worst.excess > 0:
        reason = (
            f"error {worst.max_abs:.3g} at row {worst.index[0]}, logit {worst.index[1]};"
            f" allowed {limit:.3g}"
        )
    elif agreed.changed:
        reason = f"{agreed.changed} of {agreed.total} decisions changed"
    return replace(
        cell.judged(cell.case, reason),
        max_abs_error=worst.max_abs,
        limit=limit,
        decisions=(agreed.total, agreed.equal, agreed.ties),
        output=output,
        least_atol=tolerance.least_atol(own_reference, np.abs(own - own_reference)),
    )


def _decided(reference: Array, candidate: Array, task: Task, tie: float) -> Decisions:
    """Return what the task's kind decides: labels, signs, an order, or the next tokens."""
    found = decisions(reference, candidate, task.kind, tie)
    if task.kind == "regression":
        return found + ranking(reference, candidate, tie)
    if task.kind == "headless" and reference.shape[1] > TOP:
        return found + top_labels(reference, candidate, TOP, tie)
    return found
