"""The oracle's answers, and how far its own arithmetic in a lower precision is from them.

case      ->  one ``Reference`` for each output, float64
dtype     ->  the noise floor of each output
prompts   ->  the tokens that it generates
padding   ->  where the answer to rows of nothing but padding is NaN; numbers mean nothing there
zeroed    ->  the answers with every task's adapters set to zero: the base under the tasks' heads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import HIDDEN_STATES, SentenceEmbedding
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError, shortened
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, LOGITS
from mtl_export.parity.cases import MIXED, STEPS, ZEROED, Case
from mtl_export.parity.outputs import Subject, answers, subjects
from mtl_export.parity.summation import AnotherOrder
from mtl_export.parity.tolerance import Tolerance, noise_floor
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS, Generator


@dataclass(frozen=True)
class Reference:
    """One output of the oracle for one case: ``[B, L]`` or ``[B, S, L]``."""

    case: Case
    subject: Subject
    logits: Array
    title: str


@dataclass(frozen=True)
class Padding:
    """Rows of nothing but padding.

    Attributes:
        inputs: By name, one row of each task, with ``task_ids``.
        is_nan: By output, bool ``[T, L]``: where the oracle's answer is NaN.
    """

    inputs: Mapping[str, Array]
    is_nan: Mapping[str, Array]


@dataclass(frozen=True)
class GeneratedTokens:
    """Greedy tokens of the oracle.

    Attributes:
        case: The prompts.
        tokens: int64 ``[B, N]``.
        margins: ``[B, N]``, by how much each token's logit was ahead of the next best.
    """

    case: Case
    tokens: Array
    margins: Array


@dataclass(frozen=True)
class ExtraChecks:
    """What is checked besides the cases.

    Attributes:
        left_out: Why cases and checks are not run, by name.
        padding: Rows of nothing but padding; None where they are not checked.
        generated: What the oracle generates; None where that is not compared.
        zeroed: The oracle's answers without adapters, by output, in the ``widest`` batch;
            empty where that is not checked.
    """

    left_out: Mapping[str, str] = field(default_factory=dict)
    padding: Padding | None = None
    generated: GeneratedTokens | None = None
    zeroed: Mapping[str, Array] = field(default_factory=dict)


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
    """Return what the oracle answers to every case; no task is in two references of one output.

    Raises:
        ParityError: No row of any reaches a layer that tasks adapt.
    """
    found = []
    for case in cases:
        # What is no answer of each row (a temperature, counts of the whole batch) is no output.
        outputs = {
            name: value
            for name, value in oracle.infer(case.inputs).items()
            if value.ndim and len(value) == len(case.task_ids)
        }
        for embedding in embeddings:
            compared = subjects(outputs, embedding, tasks)
            for subject in compared:
                if subject.embedding is not None and HIDDEN_STATES not in outputs and subject.tasks:
                    continue  # no row of this case is of a task that has hidden states
                is_only = len(compared) == 1 or subject.tasks
                title = case.name if is_only else f"{case.name}, {subject.output}"
                found.append(Reference(case, subject, subject.of(outputs, case), title))
    if uncalled := getattr(oracle, "uncalled", ()):
        raise ParityError(
            f"parity inputs: no row reaches the adapted layers {shortened(uncalled)}",
            expected="rows that every adapted layer computes something from",
            fix=(
                "Pass rows of all that the model takes, such as images beside text: --inputs "
                "arrays.npz with each input by name, [N, ...], and task_ids [N]; a layer that the "
                "model never calls was never trained"
            ),
        )
    return found


def widest(exact: Sequence[Reference]) -> Reference:
    """Return the first answer to a batch of most tasks, of several the mixed one."""
    return max(
        exact, key=lambda one: (len(set(one.case.task_ids.tolist())), one.case.name == MIXED)
    )


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
            floors = [[one[subject] for one in found] for subject in found[0]]
            if seed >= ORDERS and all(max(one) <= SPREAD * min(one) for one in floors):
                break
            with AnotherOrder(seed):
                found.append(_floors(tasks, exact, runner, dtype))
    largest = {subject: max(one[subject] for one in found) for subject in found[0]}
    _refuse_blunt(exact, largest, tolerance or Tolerance(), dtype)
    return largest


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


def padding_of(oracle: Runner, exact: Sequence[Reference]) -> Padding | None:
    """Return what the oracle answers to padding; None where no answer is one of a whole row."""
    pooled = [
        one
        for one in exact
        if one.logits.ndim == 2
        and one.subject.embedding is None
        and not one.subject.is_across_rows
        and {INPUT_IDS, ATTENTION_MASK} <= one.case.inputs.keys()
        and NEW_TOKENS not in one.case.inputs
    ]
    if not pooled:
        return None
    case = widest(pooled).case
    _, first = np.unique(case.task_ids, return_index=True)
    inputs = {name: value[first].copy() for name, value in case.inputs.items()}
    inputs[ATTENTION_MASK][:] = 0
    outputs = oracle.infer(inputs)
    names = {one.subject.output for one in pooled if one.case is case}
    return Padding(inputs, {name: np.isnan(outputs[name]) for name in names})


def tokens_of_oracle(oracle: Runner, cases: Sequence[Case]) -> GeneratedTokens | None:
    """Return what the oracle generates after the first prompts of most tasks, if it does."""
    prompts = [case for case in cases if NEW_TOKENS in case.inputs]
    if not prompts or not isinstance(oracle, Generator):
        return None
    case = max(prompts, key=lambda case: len(set(case.task_ids.tolist())))
    tokens = oracle.generate(case.inputs, STEPS)
    logits = oracle.infer({**case.inputs, NEW_TOKENS: tokens})[LOGITS]
    ordered = np.sort(logits, axis=-1)
    return GeneratedTokens(case, tokens, ordered[..., -1] - ordered[..., -2])


def without_adapters(bound: BoundModel) -> BoundModel | str:
    """Return the base under the tasks' heads, or why there is no such model."""
    adapters = bound.adapters
    if bound.checkpoint.members:
        return "each task's adapter is a checkpoint of its own"
    if adapters.replaced or adapters.own_tensors:
        return "the checkpoint replaces tensors of the base"
    if any(getattr(layer, "gain", None) is not None for layer in adapters.layers.values()):
        return "gains are not zero where adapters are"
    if any(layer.bias is not None for layer in adapters.outlines.values()):
        return "tasks have biases of their own"
    return replace(bound, checkpoint=replace(bound.checkpoint, layers={}))


def with_zeroed(
    extra: ExtraChecks, exact: Sequence[Reference], base: Callable[[str], Runner] | str | None
) -> ExtraChecks:
    """Return ``extra`` with the answers of the model without adapters to the ``widest`` batch.

    Args:
        extra: What is checked besides.
        exact: The oracle's answers to the cases.
        base: The oracle of the model without adapters, or why there is none; None: not checked.
    """
    if isinstance(base, str):
        return replace(extra, left_out={ZEROED: base, **extra.left_out})
    if base is None or ZEROED in extra.left_out:
        return extra
    case = widest(exact).case
    with base("fp64") as runner:
        outputs = runner.infer(case.inputs)
    zeroed = {
        one.subject.output: one.subject.of(outputs, case)
        for one in exact
        if one.case is case and one.subject.embedding is None
    }
    return replace(extra, zeroed=zeroed)
