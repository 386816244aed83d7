"""Verdicts on layers, from what they are given and make in the oracle and in an artefact.

    error      |y' - y|           y' of the artefact, y of the oracle in float64
    own error  |y' - layer(x')|   layer the oracle's own, x' what the artefact gave its layer

An error that only came in from layers before it is in the first and not in the second, so the
layer that is wrong is named even where everything after it is off. Both are held against their
noise floor: the same formula with the oracle in the artefact's dtype in place of the artefact.

B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.cases import Case
from mtl_export.parity.diagnosis import likely_cause
from mtl_export.parity.diagnosis.activations import Activation, Activations, OracleLayers
from mtl_export.parity.diagnosis.known_faults import right_formula
from mtl_export.parity.diagnosis.layer_errors import Finding, LayerError
from mtl_export.parity.reference import ORDERS
from mtl_export.parity.summation import AnotherOrder
from mtl_export.parity.tolerance import FLOOR_FACTOR, HALF_ULP, noise_floor

Result = TypeVar("Result")
# Wrong layers of one batch whose cause is looked for, in the order they run.
MOST_EXPLAINED = 32


@dataclass(frozen=True, slots=True)
class LayerValues:
    """One layer under one task: what it is given and makes.

    Attributes:
        module: The layer.
        task: The task.
        exact: In the oracle in float64.
        floors: Of what it is given and of what it makes: see ``activation_floors``.
        found: In the artefact.
        mask: bool ``[B, S]`` of the tokens that count; None where all do.
    """

    module: str
    task: Task
    exact: Activation
    floors: tuple[float, float]
    found: Activation
    mask: Array | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Errors and floors of one layer under one task; an error without a number is None.

    Attributes:
        module: The layer.
        task: The task.
        given_error: Of what the layer is given.
        given_floor: Its floor.
        error: Of what it makes.
        floor: Its floor.
        own_error: Of what it makes, against the oracle's layer on the same input.
        own_floor: Its floor.
        is_finite: What it is given is.
        evidence: What it is given and makes, and the tokens that count, where it looks wrong.
    """

    module: str
    task: Task
    given_error: float | None
    given_floor: float
    error: float | None
    floor: float
    own_error: float | None
    own_floor: float
    is_finite: bool
    evidence: tuple[Activation, Array | None] | None


def measured(
    bound: BoundModel, at_layer: LayerValues, exact: OracleLayers, lower: OracleLayers, dtype: str
) -> Sizes:
    """Return the errors and floors of one layer under one task."""
    found, module, index = at_layer.found, at_layer.module, at_layer.task.index
    own_error, own_floor = None, 0.0
    if finite := bool(np.isfinite(found.given).all()):
        wanted = exact.result(module, index, found.given)
        own_floor = _floor(wanted, lower.result(module, index, found.given), at_layer.mask, dtype)
        own_error = _error(wanted, found.result, at_layer.mask)
        if _is_beyond(own_error, own_floor):
            for less in in_other_orders(lambda: lower.result(module, index, found.given)):
                own_floor = max(own_floor, _floor(wanted, less, at_layer.mask, dtype))
            if (right := right_formula(bound, module, index)) is not None:
                # Few outputs can be exact by chance in every order.
                terms = HALF_ULP[dtype] * right.largest_sum(found.given)
                own_floor = max(own_floor, 2 * terms / FLOOR_FACTOR)
    return Sizes(
        module, at_layer.task,
        _error(at_layer.exact.given, found.given, at_layer.mask), at_layer.floors[0],
        _error(at_layer.exact.result, found.result, at_layer.mask), at_layer.floors[1],
        own_error, own_floor, finite,
        (found, at_layer.mask) if finite and _is_beyond(own_error, own_floor) else None,
    )  # fmt: skip


def in_other_orders(compute: Callable[[], Result]) -> Iterator[Result]:
    """Yield what ``compute`` returns in each other order of summation that is asked."""
    for seed in range(1, ORDERS):
        with AnotherOrder(seed):
            result = compute()
        yield result


def activation_floors(
    exact: Activations, lower: Iterable[Activations], mask: Array | None, dtype: str
) -> dict[str, tuple[float, float]]:
    """Return the floors of what each layer is given and makes.

    Args:
        exact: In the oracle in float64.
        lower: In the artefact's dtype, in several orders of summation: the worst counts.
        mask: bool ``[B, S]`` of the tokens that count; None where all do.
        dtype: The artefact's.
    """
    floors = dict.fromkeys(exact, (0.0, 0.0))
    for activations in lower:
        for module, one in exact.items():
            given = _floor(one.given, activations[module].given, mask, dtype)
            result = _floor(one.result, activations[module].result, mask, dtype)
            before = floors[module]
            floors[module] = (max(before[0], given), max(before[1], result))
    return floors


def levelled(sizes: Sequence[Sizes]) -> list[Sizes]:
    """Return them with one floor for all tasks of a layer: few rows may be exact by chance."""
    floors: dict[str, tuple[float, float, float]] = {}
    for one in sizes:
        own = (one.given_floor, one.floor, one.own_floor)
        before = floors.get(one.module, own)
        floors[one.module] = (
            max(own[0], before[0]), max(own[1], before[1]), max(own[2], before[2]),
        )  # fmt: skip
    levelled = []
    for one in sizes:
        given_floor, floor, own_floor = floors[one.module]
        levelled.append(replace(one, given_floor=given_floor, floor=floor, own_floor=own_floor))
    return levelled


def judged(
    bound: BoundModel, sizes: Sequence[Sizes], case: Case, dtype: str
) -> list[tuple[Sizes, LayerError]]:
    """Return the verdict on each, with the cause of wrong layers where one is known."""
    found, explained = [], 0
    for one in sizes:
        is_faulty = one.is_finite and _is_beyond(one.own_error, one.own_floor)
        beyond = _is_beyond(one.error, one.floor)
        error = LayerError(
            one.module, one.task.name, case.name, one.error, one.floor, one.own_error,
            one.own_floor, "faulty" if is_faulty else "propagated" if beyond else "within",
        )  # fmt: skip
        if is_faulty and one.evidence is not None and explained < MOST_EXPLAINED:
            explained += 1
            seen, mask = one.evidence
            error = likely_cause.explained(bound, error, one.task, seen, mask, dtype)
        found.append((one, error))
    return found


def _is_beyond(error: float | None, floor: float) -> bool:
    return error is None or error > FLOOR_FACTOR * floor


def _error(wanted: Array, found: Array, mask: Array | None) -> float | None:
    """Return the largest error of what counts; None where it has no number."""
    left, right = counting(wanted, found, mask)
    if left.shape != right.shape:
        return None
    finite = np.isfinite(left)
    if not np.array_equal(left[~finite], right[~finite]) or not np.isfinite(right[finite]).all():
        return None
    return float(np.abs(right[finite] - left[finite]).max(initial=0.0))


def _floor(wanted: Array, less: Array, mask: Array | None, dtype: str) -> float:
    left, right = counting(wanted, less, mask)
    if not np.isfinite(right[np.isfinite(left)]).all():
        # The dtype itself overflows here: nothing finite can be within that.
        finite = left[np.isfinite(left)]
        return HALF_ULP[dtype] * float(np.abs(finite).max(initial=0.0))
    return noise_floor(left, right, dtype)


def counting(wanted: Array, found: Array, mask: Array | None) -> tuple[Array, Array]:
    """Return what counts of two results: no padding, and as many columns as both have.

    Heads of all tasks are as wide as the widest, the missing labels -inf; a merged head is not.
    """
    if len(wanted) == 1 and wanted.shape[1:] == found.shape[1:]:
        wanted = np.broadcast_to(wanted, found.shape)  # positions: one row for all
    width = min(wanted.shape[-1], found.shape[-1])
    rest = (wanted[..., width:], found[..., width:])
    if wanted.shape[:-1] == found.shape[:-1] and all(np.isneginf(one).all() for one in rest):
        wanted, found = wanted[..., :width], found[..., :width]
    is_masked = mask is not None and wanted.ndim > 2 and wanted.shape[:2] == mask.shape
    if is_masked and wanted.shape == found.shape:
        return wanted[mask], found[mask]
    return wanted, found


def finding(task: str, case: Case, layers: Sequence[tuple[Sizes, LayerError]]) -> Finding:
    """Return where the error of one task begins; ``layers`` in the order they run."""
    last = ""
    for sizes, error in layers:
        if _is_beyond(sizes.given_error, sizes.given_floor):
            where = f"after {last}, before {error.layer}" if last else f"before {error.layer}"
            text = f"the error begins {where}: outside the layers that tasks change"
            return Finding(task, case.name, error.layer, last, "", text)
        if error.verdict == "faulty":
            why = f": {error.cause}" if error.cause else ", the cause is not a known one"
            more = f" ({error.detail})" if error.detail else ""
            text = f"{error.layer} is wrong{why}{more}"
            return Finding(task, case.name, error.layer, "", error.cause, text)
        last = error.layer
    text = (
        f"no layer that tasks change is beyond {FLOOR_FACTOR:g} noise floors in {case.name};"
        f" the last of them is {last}"
    )
    return Finding(task, case.name, "", last, "", text)
