"""What the oracle answers, and how far its own arithmetic in a lower precision is from that.

case  ->  one ``Reference`` for each output, float64
dtype ->  the noise floor of each output
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import HIDDEN_STATES, SentenceEmbedding
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError, shortened
from mtl_export.parity.cases import Case
from mtl_export.parity.outputs import Subject, answers, subjects
from mtl_export.parity.summation import AnotherOrder
from mtl_export.parity.tolerance import Tolerance, noise_floor
from mtl_export.runtime.runners.base import Runner


@dataclass(frozen=True)
class Reference:
    """One output of the oracle for one case: ``[B, L]`` or ``[B, S, L]``."""

    case: Case
    subject: Subject
    logits: Array
    title: str


# Orders of summation that are always tried, and at most, where the largest floor they give is
# more than SPREAD times the least. With one order alone tests/benchmarks/bench_gate.py found a
# correct T5 at 38 floors: at one token numbers cancel, and orders differ there by a factor of 60.
ORDERS, MOST_ORDERS, SPREAD = 4, 16, 3.0
_FIX_OF_EXACT = (
    "Look for NaN in the rows, the base and the adapter; where all are finite, the model itself"
    " computes none from such rows: pass others to --inputs"
)
_FIX_OF_LOWER = (
    "In fp64 they are finite, so numbers of the model are beyond {}: export with --dtype fp32, or"
    " bf16"
)
# Up to this share of the largest answer, noise is taken for rounding.
ROUNDING = 0.01
# By output, the error that the arithmetic of a dtype costs the model.
Floors = dict[Subject, float]


def references_of(
    oracle: Runner,
    cases: Sequence[Case],
    embeddings: Sequence[SentenceEmbedding | None],
    tasks: Sequence[Task],
) -> list[Reference]:
    """Return what the oracle answers to every case.

    Raises:
        ParityError: No row of any reaches a layer that tasks adapt.
    """
    found = [one for case in cases for one in _references(oracle, case, embeddings, tasks)]
    _refuse_uncalled(getattr(oracle, "uncalled", ()))
    return found


def _references(
    oracle: Runner,
    case: Case,
    embeddings: Sequence[SentenceEmbedding | None],
    tasks: Sequence[Task],
) -> list[Reference]:
    """Return what the oracle answers to one case; no task is in two references of one output."""
    outputs = oracle.infer(case.inputs)
    count = len(case.task_ids)
    # What is no answer of each row (a temperature, counts of the whole batch) is no output.
    outputs = {n: value for n, value in outputs.items() if value.ndim and len(value) == count}
    found = []
    for embedding in embeddings:
        compared = subjects(outputs, embedding, tasks)
        for subject in compared:
            if subject.embedding is not None and HIDDEN_STATES not in outputs and subject.tasks:
                continue  # no row of this case is of a task that has hidden states
            is_only = len(compared) == 1 or subject.tasks
            title = case.name if is_only else f"{case.name}, {subject.output}"
            found.append(Reference(case, subject, subject.of(outputs, case), title))
    return found


def noise_floors(
    tasks: Sequence[Task],
    exact: list[Reference],
    lower_precision: Runner,
    dtype: str,
    tolerance: Tolerance | None = None,
) -> Floors:
    """Return the noise floor of each output over all cases and several orders of summation.

    It is the same for every task: the one whose few rows happen to be computed well would
    otherwise fail correct exports. Where the orders differ much, one of them is no measure,
    and many are tried.

    Raises:
        ParityError: An answer is not finite, or what ``tolerance`` makes of noise excuses any.
    """
    with lower_precision as runner:
        found = [_floors(tasks, exact, runner, dtype)]
        for seed in range(1, MOST_ORDERS):
            if seed >= ORDERS and not any(_differ(found, subject) for subject in found[0]):
                break
            with AnotherOrder(seed):
                found.append(_floors(tasks, exact, runner, dtype))
    floors = {subject: max(one[subject] for one in found) for subject in found[0]}
    _refuse_blunt(exact, floors, tolerance or Tolerance(), dtype)
    return floors


def _differ(found: list[Floors], subject: Subject) -> bool:
    values = [floors[subject] for floors in found]
    return max(values) > SPREAD * min(values)


def _floors(tasks: Sequence[Task], exact: list[Reference], runner: Runner, dtype: str) -> Floors:
    """Return the noise floor of each output in one order of summation."""
    floors: Floors = {}
    outputs: dict[int, dict[str, Array]] = {}
    for reference in exact:
        case, subject = reference.case, reference.subject
        if id(case) not in outputs:
            outputs = {id(case): runner.infer(case.inputs)}
        lower = subject.of(outputs[id(case)], case)
        for task in tasks:
            rows = case.task_ids == task.index
            if rows.any() and subject.serves(task):
                own = slice(subject.columns(task, int(rows.sum())))
                wanted = answers(case, rows, reference.logits)[:, own]
                found = answers(case, rows, lower)[:, own]
                _refuse_not_finite(task, case, dtype, wanted, found)
                floor = noise_floor(wanted, found, dtype)
                floors[subject] = max(floors.get(subject, 0.0), floor)
    return floors


def _refuse_not_finite(task: Task, case: Case, dtype: str, exact: Array, lower: Array) -> None:
    for name, values in (("fp64", exact), (dtype, lower)):
        if not np.isfinite(values).all():
            raise ParityError(
                f"oracle in {name}, task {task.name}, {case.name}: "
                f"{int((~np.isfinite(values)).sum())} logits are NaN or Inf",
                expected="finite logits, because no error can be measured against them",
                fix=_FIX_OF_EXACT if name == "fp64" else _FIX_OF_LOWER.format(name),
            )


def _refuse_uncalled(layers: Sequence[str]) -> None:
    """Refuse a comparison in which adapted layers computed nothing.

    Raises:
        ParityError: There are any.
    """
    if layers:
        raise ParityError(
            f"parity inputs: no row reaches the adapted layers {shortened(layers)}",
            expected=(
                "rows that every adapted layer computes something from, because an error in the "
                "others would not be seen"
            ),
            fix=(
                "Pass rows of all that the model takes, such as images beside text: --inputs "
                "arrays.npz with each input by name, [N, ...], and task_ids [N]; a layer that the "
                "model never calls was never trained"
            ),
        )


def _refuse_blunt(
    exact: Sequence[Reference], floors: Floors, tolerance: Tolerance, dtype: str
) -> None:
    """Refuse a comparison that any answer would pass.

    Raises:
        ParityError: What noise excuses is more than all answers of an output differ by.
    """
    for subject, floor in floors.items():
        own = tolerance.of(subject.output)
        values = [one.logits[np.isfinite(one.logits)] for one in exact if one.subject == subject]
        every = np.concatenate([value.ravel() for value in values])
        spread = float(np.ptp(every)) if every.size else 0.0
        # Answers that are alike (one row, two labels) may differ by no more than rounding.
        is_rounding = floor <= ROUNDING * float(np.abs(every).max(initial=0.0))
        if own.atol is None and own.factor * floor > spread and not is_rounding:
            raise ParityError(
                f"oracle in {dtype}, {subject.output}: its own arithmetic moves answers by "
                f"{floor:.3g}, and all of them lie within {spread:.3g}",
                expected=(
                    f"noise of which {own.factor:g} times is less, because any answer would pass"
                ),
                fix=(
                    "Give --atol and --rtol, or a wider --dtype; a model that picks the best of "
                    "its candidates may pick others at any rounding: pass rows to --inputs whose "
                    "picks are clear"
                ),
            )
