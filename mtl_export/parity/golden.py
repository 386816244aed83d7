"""Batches that parity ran -> golden vectors: two rows of each task, and one mixed batch.

Of a language model also a batch whose tokens are fed one by one.

The mixed batch ends with a task id that does not exist: that it is not answered is kept too.
What is saved is the candidate's own output, so the same runtime gives it again exactly, and
another one within what arithmetic explains: ``FLOOR_FACTOR`` noise floors. A wider --atol or
--rtol, which says how far the candidate may be from the reference, is cut to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.names import ATTENTION_MASK, LOGITS, TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import MIXED, Case
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.golden import Vector
from mtl_export.runtime.runners.language import NEW_TOKENS

ROWS_PER_TASK = 2
MOST_MIXED = 16
STEPS = "steps from the cache"
UNKNOWN = "an id that no task has"


def golden_vectors(
    artefact: Artefact,
    cases: Sequence[Case],
    tasks: Sequence[Task],
    floors: Mapping[str, float],
    tolerance: Tolerance,
) -> tuple[Vector, ...]:
    """Return what an artefact, whose runner is open, answers to a few rows.

    Args:
        artefact: A graph or an engine.
        cases: Those of the comparison.
        tasks: All tasks of the checkpoint.
        floors: Noise floor by task name, for the artefact's dtype.
        tolerance: What parity allowed.
    """
    task = artefact.task
    own = tasks if task is None else [task]
    floor = max(floors[one.name] for one in own)
    vectors = [
        _vector(artefact, one.name, _rows_of(cases, one), floors[one.name], tolerance)
        for one in own
    ]
    steps = [case for case in cases if NEW_TOKENS in case.inputs]
    if steps and len(steps) < len(cases):  # else every batch above has them
        rows = _mixed(steps) if task is None else _rows_of(steps, task)
        if rows:
            vectors.append(_vector(artefact, STEPS, rows, floor, tolerance))
    if task is None:
        mixed = _mixed(cases)
        vectors.append(_vector(artefact, MIXED, mixed, floor, tolerance))
        unknown = {name: value[-2:] for name, value in mixed.items()}
        unknown[TASK_IDS] = np.array([mixed[TASK_IDS][-2], len(tasks)], mixed[TASK_IDS].dtype)
        # A runtime that refuses the batch is as good, but gives nothing to save.
        with suppress(EngineRunError):
            vectors.append(_vector(artefact, UNKNOWN, unknown, floor, tolerance))
    # Where noise is as large as the answers, a pass would show nothing, and verify refuses it.
    return tuple(vector for vector in vectors if not vector.vacuity)


def for_engine(vectors: Sequence[Vector], model: str) -> tuple[Vector, ...]:
    """Return a graph's vectors for the engine built from it, which could not be run here.

    Each side may be off by what is allowed, so their difference by twice that. Engines
    refuse unknown ids before they run.
    """
    doubled = (
        replace(one, model=model, atol=2 * one.atol, rtol=2 * one.rtol)
        for one in vectors
        if one.name != UNKNOWN
    )
    return tuple(one for one in doubled if not one.vacuity)


def _rows_of(cases: Sequence[Case], task: Task) -> dict[str, Array]:
    """Return the first rows of a task; empty without any."""
    for case in cases:
        rows = np.flatnonzero(case.task_ids == task.index)[:ROWS_PER_TASK]
        if rows.size:
            return case.rows(rows)
    return {}


def _mixed(cases: Sequence[Case]) -> dict[str, Array]:
    """Return one row of each task from the batch with the most, the last one twice."""
    case = max(cases, key=lambda one: len(np.unique(one.task_ids)))
    _, first = np.unique(case.task_ids, return_index=True)
    rows = np.sort(first)[:MOST_MIXED]
    rows = np.append(rows, rows[-1])
    return case.rows(rows)


def _vector(
    artefact: Artefact, name: str, rows: Mapping[str, Array], floor: float, tolerance: Tolerance
) -> Vector:
    rows = artefact.given(rows)
    outputs = artefact.infer(rows)
    if NEW_TOKENS not in rows and any(value.ndim > 2 for value in outputs.values()):
        # What a model says of padding is nobody's concern, and may differ elsewhere.
        rows = _without_padding(rows)
        outputs = artefact.infer(rows)
    outputs = {LOGITS: outputs[LOGITS]} if LOGITS in outputs else outputs
    # A vector has one rule for all of its outputs: the widest of theirs.
    rules = [tolerance.of(output) for output in outputs]
    most = tolerance.factor * floor
    atol = max(most if one.atol is None else one.atol for one in rules)
    rtol = max(one.rtol or 0.0 for one in rules)
    sizes = [np.abs(value[np.isfinite(value)]).max(initial=0.0) for value in outputs.values()]
    largest = float(max(sizes, default=0.0))
    rtol = min(rtol, most / largest if largest else 0.0)
    model = "" if artefact.path is None else artefact.path.name
    return Vector(name, model, rows, outputs, min(atol, most), rtol)


def _without_padding(rows: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return the rows cut to the positions where none has padding."""
    mask = rows.get(ATTENTION_MASK)
    if mask is None:
        return rows
    whole = (mask == 1).all(axis=0)
    return {
        name: value[:, whole] if value.shape[:2] == mask.shape else value
        for name, value in rows.items()
    }
