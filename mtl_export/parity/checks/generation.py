"""What a language model must get right besides the prompt: every step, and what it says.

    steps      tokens that nobody chose, fed one by one; the logits of each step are compared
               with the oracle's, which knows no cache
    tokens     what greedy decoding says, against transformers' ``generate``
    bad ids    a good prompt that goes on under an id outside [0, T)

B rows, N new tokens, L vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, LOGITS, TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import MIXED, Case
from mtl_export.parity.report import Cell, Verdict
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.language import NEW_TOKENS, PROMPT_TASK_IDS, Generator

STEPS = 8
LONG = "batch "


@dataclass(frozen=True)
class GeneratedTokens:
    """What the oracle says.

    Attributes:
        case: The prompts.
        tokens: int64 ``[B, N]``.
        margins: ``[B, N]``, by how much each token's logit was ahead of the next best.
    """

    case: Case
    tokens: Array
    margins: Array


def step_cases(cases: Sequence[Case], *, vocabulary: int, longest: int) -> list[Case]:
    """Return prompts of the mixed and of the long batch, each with seeded tokens to go on.

    Args:
        cases: From ``cases.build_cases``.
        vocabulary: Token ids lie in [0, vocabulary).
        longest: Most tokens the model takes, prompt and new ones.
    """
    generator = np.random.default_rng(2)
    mixed = next(case for case in cases if case.name == MIXED)
    long = next(case for case in cases if case.name.startswith(LONG))
    found = []
    for case in (mixed, long):
        prompts = {
            name: case.inputs[name][:, : longest - STEPS] for name in (INPUT_IDS, ATTENTION_MASK)
        }
        shape = (len(case.task_ids), STEPS)
        tokens = generator.integers(0, vocabulary, shape, dtype=np.int64)
        inputs = {**prompts, TASK_IDS: case.task_ids, NEW_TOKENS: tokens}
        found.append(Case(f"{STEPS} steps, {case.name}", inputs, case.preset))
    return found


def tokens_of_oracle(oracle: Runner, cases: Sequence[Case]) -> GeneratedTokens | None:
    """Return what the oracle says after the first prompts of most tasks; None without steps."""
    spoken = [case for case in cases if NEW_TOKENS in case.inputs]
    if not spoken or not isinstance(oracle, Generator):
        return None
    case = max(spoken, key=lambda case: len(set(case.task_ids.tolist())))
    tokens = oracle.generate(case.inputs, STEPS)
    logits = oracle.infer({**case.inputs, NEW_TOKENS: tokens})[LOGITS]
    ordered = np.sort(logits, axis=-1)
    return GeneratedTokens(case, tokens, ordered[..., -1] - ordered[..., -2])


def token_cells(
    artefact: Artefact,
    runner: Runner,
    generated: GeneratedTokens,
    tasks: Sequence[Task],
    limit: float,
) -> list[Cell]:
    """Return one cell for each task served: whether the artefact says what the oracle says.

    Rows part for good at their first unequal token. It is a tie when the oracle's margin
    there is at most twice ``limit``, the error that each side may have.
    """
    served = tasks if artefact.task is None else [artefact.task]
    ids = generated.case.task_ids
    if not isinstance(runner, Generator):
        reason = f"{runner.name} runs one graph, and generation takes two"
        return [_cell(artefact, task, "not-run", reason) for task in served if task.index in ids]
    chosen = np.ones(len(ids), np.bool_) if artefact.task is None else ids == artefact.task.index
    if not chosen.any():
        return []
    inputs = generated.case.rows(chosen)
    if artefact.task is not None:
        del inputs[TASK_IDS]
    found = np.full_like(generated.tokens, -1)
    found[chosen] = runner.generate(inputs, STEPS)
    return [
        _compared(artefact, task, generated, found, limit) for task in served if task.index in ids
    ]


def _compared(
    artefact: Artefact, task: Task, generated: GeneratedTokens, found: Array, limit: float
) -> Cell:
    total = equal = ties = 0
    reason = ""
    for row in np.flatnonzero(generated.case.task_ids == task.index):
        total += STEPS
        same = generated.tokens[row] == found[row]
        first = STEPS if same.all() else int(same.argmin())
        equal += first
        if first < STEPS and generated.margins[row, first] <= 2 * limit:
            ties += STEPS - first
        elif first < STEPS and not reason:
            reason = (
                f"token {first} of row {row} is {found[row, first]}, not "
                f"{generated.tokens[row, first]}, "
                f"which leads by {generated.margins[row, first]:.3g}"
            )
    cell = _cell(artefact, task, "failed" if reason else "passed", reason)
    return replace(cell, decisions=(total, equal, ties))


def _cell(artefact: Artefact, task: Task, verdict: Verdict, reason: str) -> Cell:
    name = f"{STEPS} tokens, {MIXED}"
    return Cell(artefact.name, artefact.runner.name, task.name, name, verdict, reason)


def bad_step_ids(
    artefact: Artefact, runner: Runner, generated: GeneratedTokens, bad: Array
) -> Cell:
    """Return the cell that says whether such ids are kept from going on with a good prompt."""
    good = generated.case.rows(np.arange(len(generated.tokens)) == 0)
    count = len(bad) + 1
    inputs = {name: np.repeat(value, count, axis=0) for name, value in good.items()}
    inputs[PROMPT_TASK_IDS] = inputs[TASK_IDS]
    inputs[TASK_IDS] = np.concatenate([good[TASK_IDS], bad])
    cell = Cell(artefact.name, runner.name, "*", "bad task ids, step", "passed")
    try:
        logits = runner.infer(inputs)[LOGITS]
    except EngineRunError:
        return cell  # refusing the whole batch is as good as poisoning the rows
    if np.isnan(logits[0]).any() or np.isnan(logits[:, 0]).any():
        return _failed(cell, "they spoil the good row beside them, or the prompt")
    silent = np.isnan(logits[1:, 1:]).reshape(len(bad), -1).all(axis=1)
    return cell if silent.all() else _failed(cell, f"ids {bad[~silent].tolist()} are answered")


def _failed(cell: Cell, reason: str) -> Cell:
    return replace(cell, verdict="failed", reason=reason)
