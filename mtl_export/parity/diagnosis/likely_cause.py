"""Name the cause of a wrong layer where exactly one known fault explains what it puts out.

    fits    |y' - fault(x')| <= k floor        everywhere, x' and y' the artefact's own

The formula of each known fault (``causes``) is computed in float64 on what the layer was given.
One that fits within rounding while no other does is the cause; faults with the same formula here
(a doubled temperature of 1/2 is a missing one) count as one. Where several differ and fit, or
none does, no cause is claimed, and what is known of the place is said instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import shortened
from mtl_export.parity.diagnosis.activations import Activation
from mtl_export.parity.diagnosis.known_faults import (
    Fault,
    Formula,
    known_faults,
    other_tasks,
    right_formula,
)
from mtl_export.parity.diagnosis.layer_errors import LayerError
from mtl_export.parity.tolerance import FLOOR_FACTOR

# Two formulas whose results differ by less than this part of the largest are one.
SAME = 1e-9
# So many outputs are named; of more, only how many they are.
MOST_NAMED = 4
# Tokens of one task that formulas are computed on: enough to tell them apart, and cheap.
MOST_TOKENS = 512
# Beyond these a dtype has no finite number.
LARGEST = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127"), "fp32": float(np.finfo("f4").max)}


def explained(
    bound: BoundModel,
    error: LayerError,
    task: Task,
    seen: Activation,
    mask: Array | None,
    dtype: str,
) -> LayerError:
    """Return ``error`` with its cause, if one is known, and with what is known of the place.

    Args:
        bound: The checkpoint and its base.
        error: A wrong layer.
        task: Under this task.
        seen: What the artefact gave its layer, finite, and what the layer made of it.
        mask: bool ``[B, S]`` of the tokens that count; None where all do.
        dtype: What the artefact computes in.
    """
    given, result = seen.given, seen.result
    right = right_formula(bound, error.layer, task.index)
    if right is None:
        return error
    if right.weight.shape[1] != given.shape[-1]:
        return dataclasses.replace(error, detail=f"it is given {given.shape[-1]} features")
    if given.shape[:-1] != result.shape[:-1]:
        return dataclasses.replace(error, detail=f"it puts out {list(result.shape)}")
    x, y, rows = _tokens(given, result, mask)
    wanted = right(x)
    if seen.is_quantised:
        return dataclasses.replace(error, detail="its input is quantised")
    if overflow := _overflow(right, x, y, dtype):
        return dataclasses.replace(error, cause=overflow)
    fitting = _fitting(known_faults(bound, error.layer, task), x, y, wanted, error)
    if len(fitting) == 1:
        return dataclasses.replace(error, cause=fitting[0])
    if not fitting and (routing := _by_row(bound, error, task, x, y, rows)):
        return dataclasses.replace(error, cause=routing)
    detail = _place(y, wanted, rows, error)
    if fitting:
        several = f"several known faults fit: {'; '.join(fitting[:MOST_NAMED])}"
        detail = f"{detail}; {several}" if detail else several
    return dataclasses.replace(error, detail=detail)


def _tokens(given: Array, result: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Return the tokens that count as ``[N, I]`` and ``[N, O]``, and the row of each."""
    rows = np.arange(len(given)).reshape(-1, *[1] * (given.ndim - 2))
    rows = np.broadcast_to(rows, given.shape[:-1])
    if mask is not None and given.ndim > 2 and given.shape[:2] == mask.shape:
        x, y, rows = given[mask], result[mask], rows[mask]
    else:
        x, y, rows = given, result, rows
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    every = -(-len(x) // MOST_TOKENS) or 1
    return x[::every], y[::every], rows.reshape(-1)[::every]


def _fitting(
    faults: Iterable[Fault], x: Array, y: Array, wanted: Array, error: LayerError
) -> list[str]:
    """Return the faults that explain y, those with one formula as one."""
    limit = FLOOR_FACTOR * error.own_floor
    size = _largest(wanted)
    found: list[tuple[str, Array]] = []
    for fault in faults:
        predicted = fault.formula(x)
        allowed = limit * max(1.0, _largest(predicted) / size if size else 1.0)
        if _differs(predicted, y) > allowed:
            continue
        same = [i for i, (_, one) in enumerate(found) if _is_same(one, predicted)]
        if same:
            name, values = found[same[0]]
            found[same[0]] = (f"{name}, here the same as: {fault.cause}", values)
        else:
            found.append((fault.cause, predicted))
    return [cause for cause, _ in found]


def _is_same(one: Array, other: Array) -> bool:
    return _differs(one, other) <= SAME * max(_largest(one), _largest(other))


def _differs(left: Array, right: Array) -> float:
    """Return the largest difference over the columns both have, Inf where one is not finite."""
    width = min(left.shape[-1], right.shape[-1])
    a, b = left[..., :width], right[..., :width]
    rest = [side[..., width:] for side in (left, right)]
    finite = np.isfinite(a)
    if (
        not all(np.isneginf(side).all() for side in rest)
        or not np.array_equal(a[~finite], b[~finite])
        or not np.isfinite(b[finite]).all()
    ):
        return float("inf")
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def _largest(values: Array) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _overflow(right: Formula, x: Array, y: Array, dtype: str) -> str:
    if np.isfinite(y).all() or dtype not in LARGEST:
        return ""
    largest = right.largest_step(x)
    if largest <= LARGEST[dtype]:
        return ""
    return f"overflow: {dtype} ends at {LARGEST[dtype]:g}, and this layer reaches {largest:.3g}"


def _by_row(
    bound: BoundModel, error: LayerError, task: Task, x: Array, y: Array, rows: Array
) -> str:
    """Return whose tensors the rows take, where each takes exactly one task's; else ""."""
    limit = FLOOR_FACTOR * error.own_floor
    right = right_formula(bound, error.layer, task.index)
    others = [*other_tasks(bound, error.layer, task)]
    if right is None or not others:
        return ""
    formulas: Sequence[Fault] = [Fault("", right, task.name), *others]
    predicted = {fault.other_task: fault.formula(x) for fault in formulas}
    taken = []
    for row in dict.fromkeys(rows.tolist()):
        own = rows == row
        fits = [name for name, y_t in predicted.items() if _differs(y_t[own], y[own]) <= limit]
        if len(fits) != 1:
            return ""
        taken.append(fits[0])
    shown = shortened(taken)
    return f"its rows take the tensors of tasks {shown}: routing does not follow task_ids"


def _place(y: Array, wanted: Array, rows: Array, error: LayerError) -> str:
    """Return which outputs and which rows are wrong, where not all are."""
    width = min(y.shape[-1], wanted.shape[-1])
    gap = np.abs(y[:, :width] - wanted[:, :width])
    wrong = ~(gap <= FLOOR_FACTOR * error.own_floor)
    outputs = np.flatnonzero(wrong.any(axis=0))
    bad_rows = [row for row in dict.fromkeys(rows.tolist()) if wrong[rows == row].any()]
    parts = []
    if 0 < len(outputs) <= width // 2:
        named = shortened((str(index) for index in outputs), MOST_NAMED)
        parts.append(f"only outputs [{named}] of {width}")
    if 0 < len(bad_rows) < len(set(rows.tolist())):
        named = shortened((str(row) for row in bad_rows), MOST_NAMED)
        parts.append(f"only rows [{named}] of the task's")
    return ", ".join(parts)
