"""One case of one artefact against the oracle: a cell for each task and output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case
from mtl_export.parity.metrics import Decisions, decisions, difference, ranking, top_labels
from mtl_export.parity.outputs import answers
from mtl_export.parity.reference import Floors, Reference
from mtl_export.parity.report import Cell
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.base import Runner

# Tokens that sampling usually chooses from.
TOP = 5


def compare_case(
    bound: BoundModel,
    artefact: Artefact,
    runner: Runner,
    references: Sequence[Reference],
    floors: Floors,
    tolerance: Tolerance,
) -> list[Cell]:
    """Return one cell for each task that ``artefact`` serves in the case, and each output."""
    case = references[0].case
    if artefact.task is not None:
        rows = case.task_ids == artefact.task.index
        if not rows.any():
            return []
        own = Case(case.name, case.rows(rows))
        outputs = runner.infer({n: value for n, value in own.inputs.items() if n != TASK_IDS})
        return [
            _compare(artefact, replace(one, case=own, logits=one.logits[rows]), artefact.task,
                     outputs.get(one.subject.merged_output), floors[one.subject], tolerance)
            for one in references if one.subject.serves(artefact.task)
        ]  # fmt: skip
    outputs = runner.infer(case.inputs)
    cells = []
    for one in references:
        for task in bound.adapters.tasks:
            rows = case.task_ids == task.index
            if rows.any() and one.subject.serves(task):
                cell = _compare(artefact, one, task, outputs.get(one.subject.output),
                                floors[one.subject], tolerance)  # fmt: skip
                others = _other_answers(one, outputs, rows) if one.subject.tasks else ""
                if cell.verdict == "passed" and others:
                    cell = replace(cell, verdict="failed", reason=others)
                cells.append(cell)
    return cells


def _other_answers(wanted: Reference, outputs: Mapping[str, Array], rows: Array) -> str:
    """Return which outputs but the task's own answer in its rows, or ""."""
    found = [
        name
        for name, value in outputs.items()
        if name != wanted.subject.output and not np.isneginf(value[rows]).all()
    ]
    if not found:
        return ""
    return f"answers in {', '.join(found)} too, but {wanted.subject.output} is the task's output"


def _compare(
    artefact: Artefact,
    wanted: Reference,
    task: Task,
    candidate: Array | None,
    floor: float,
    tolerance: Tolerance,
) -> Cell:
    """Return the cell for the task's rows.

    The reference is [B, widest], or [B, S, widest] where every token has its own logits.
    """
    case, output, reference = wanted.case, wanted.subject.output, wanted.logits
    rows = case.task_ids == task.index

    def failed(reason: str) -> Cell:
        return Cell(
            artefact.name, artefact.runner.name, task.name, wanted.title, "failed", reason,
            noise_floor=floor,
        )  # fmt: skip

    if candidate is None:
        return failed(f"no output {output!r}")
    axis = 1 if reference.ndim > 3 else -1  # of maps, labels stand before height and width
    labels = wanted.subject.columns(task, int(rows.sum())) or reference.shape[axis]
    shape = list(reference.shape)
    shape[axis] = reference.shape[axis] if artefact.task is None else labels
    expected = (len(rows), *shape[1:])
    if candidate.shape != expected:
        return failed(f"{output} has shape {list(candidate.shape)}, not {list(expected)}")
    reference, candidate = answers(case, rows, reference), answers(case, rows, candidate)
    if not np.isneginf(candidate[:, labels:]).all():
        return failed(f"columns {labels} and up answer, but the task has {labels} labels")
    own_reference, own = reference[:, :labels], candidate[:, :labels]
    if not np.isfinite(own).all():
        return failed(f"{int((~np.isfinite(own)).sum())} values are NaN or Inf")
    tolerance = tolerance.of(output)
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
    return Cell(
        artefact.name, artefact.runner.name, task.name, wanted.title,
        "failed" if reason else "passed", reason, worst.max_abs, floor, limit,
        (agreed.total, agreed.equal, agreed.ties), output,
        tolerance.least_atol(own_reference, np.abs(own - own_reference)),
    )  # fmt: skip


def _decided(reference: Array, candidate: Array, task: Task, tie: float) -> Decisions:
    """Return what the task's kind decides: labels, signs, an order, or the next tokens."""
    found = decisions(reference, candidate, task.kind, tie)
    if task.kind == "regression":
        return found + ranking(reference, candidate, tie)
    if task.kind == "headless" and reference.shape[1] > TOP:
        return found + top_labels(reference, candidate, TOP, tie)
    return found
