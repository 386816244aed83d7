from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.parity.cases import STEPS, Case, RowLimits, step_cases
from mtl_export.parity.checks.generation import TOKENS, token_cells
from mtl_export.parity.judged import BAD_IDS
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import (
    ExtraChecks,
    GeneratedTokens,
    Reference,
    tokens_of_oracle,
)
from mtl_export.parity.report import Cell
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.language import NEW_TOKENS, PROMPT_TASK_IDS, Generator, positions
from tests.graph import marked
from tests.parity import fakes

TASKS = marked.TASKS
BAD = [*BAD_IDS, 3]
LIMIT = 0.25


def bad_as_good(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Refuse ids that no task has."""
    raise EngineRunError("task_ids: a bad one")


class Speaker(fakes.FakeRunner):
    """A runner that says what it is told to."""

    def __init__(self, tokens: Array, answer: fakes.Answer = fakes.right) -> None:
        super().__init__(answer)
        self._tokens = tokens

    def __enter__(self) -> Speaker:
        """Open."""
        super().__enter__()
        return self

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return the rows that were asked for, told apart by their first token."""
        assert max_new_tokens == STEPS
        return self._tokens[inputs["input_ids"][:, 0]]


@pytest.fixture
def generated() -> GeneratedTokens:
    """Return six rows, two of each task, with margins of 1."""
    inputs = {
        "input_ids": np.arange(6)[:, None], "attention_mask": np.ones((6, 1), np.int64),
        "task_ids": np.array([0, 1, 2] * 2), NEW_TOKENS: np.zeros((6, STEPS), np.int64),
    }  # fmt: skip
    tokens = np.arange(6 * STEPS).reshape(6, STEPS)
    return GeneratedTokens(Case("prompts", inputs), tokens, np.ones(tokens.shape))


def judged(
    generated: GeneratedTokens, runner: fakes.FakeRunner, task: int | None = None
) -> list[Cell]:
    """Return the cells on what would ship with this runner; a single graph's last is on bad ids."""
    case = generated.case
    reference = Reference(case, Subject("logits"), np.zeros((6, STEPS, 5)), case.name)
    record = fakes.judged_by(runner, reference)
    floors = {reference.subject: LIMIT}
    extra = ExtraChecks(generated=generated)
    record = replace(record, extra=extra, floors=floors, tolerance=Tolerance(factor=1.0))
    if task is not None:
        artefact = replace(record.artefact, kind="per-task", task=TASKS[task])
        record = replace(record, artefact=artefact).of_tasks([task])
    with runner:
        return token_cells(record)


def cells(generated: GeneratedTokens, tokens: Array, task: int | None = None) -> dict[str, str]:
    """Return the verdict on these tokens by task."""
    found = judged(generated, Speaker(tokens, bad_as_good), task)
    return {cell.task: cell.verdict for cell in found if cell.case == TOKENS}


def test_equal_tokens_pass(generated: GeneratedTokens) -> None:
    """Every task is judged, a merged artefact for its own alone."""
    assert cells(generated, generated.tokens) == dict.fromkeys("abc", "passed")
    assert cells(generated, generated.tokens, task=1) == {"b": "passed"}


def test_one_wrong_token_fails_its_task_alone(generated: GeneratedTokens) -> None:
    """The message names step, row and both tokens."""
    tokens = generated.tokens.copy()
    tokens[4, 3:] = 99
    assert cells(generated, tokens) == {"a": "passed", "b": "failed", "c": "passed"}
    cell = judged(generated, Speaker(tokens, bad_as_good))[1]
    assert cell.reason == "token 3 of row 4 is 99, not 35, which leads by 1"
    assert cell.decisions == (2 * STEPS, STEPS + 3, 0)


def test_a_close_call_is_a_tie_and_so_is_what_follows(generated: GeneratedTokens) -> None:
    """Where the oracle itself nearly said another token, rows part without blame."""
    margins = generated.margins.copy()
    margins[4, 3] = 2 * LIMIT
    tokens = generated.tokens.copy()
    tokens[4, 3:] = 99
    close = replace(generated, margins=margins)
    assert cells(close, tokens) == dict.fromkeys("abc", "passed")
    cell = judged(close, Speaker(tokens, bad_as_good))[1]
    assert cell.decisions == (2 * STEPS, STEPS + 3, STEPS - 3)


def test_a_runner_of_one_graph_is_not_run(generated: GeneratedTokens) -> None:
    """What cannot generate has not passed."""
    found = judged(generated, fakes.FakeRunner(bad_as_good, name="one graph"))[:-1]
    assert [cell.task for cell in found] == ["a", "b", "c"]
    assert {cell.verdict for cell in found} == {"not-run"}
    assert "one graph" in found[0].reason


@pytest.mark.parametrize(
    ("silent", "reason"),
    [
        ([1, 2, 3, 4], ""),
        ([2, 3, 4], "ids [-1] are answered"),
        ([0, 1, 2, 3, 4], "they spoil the good row beside them, or the prompt"),
    ],
)
def test_bad_ids_at_a_step(generated: GeneratedTokens, silent: list[int], reason: str) -> None:
    """The prompts are read under a good id; from the first step on, bad rows must be NaN."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert inputs[PROMPT_TASK_IDS].tolist() == [0] * 5
        assert inputs["task_ids"].tolist() == [0, *BAD]
        logits = np.zeros((5, STEPS, 5))
        logits[silent, 1:] = np.nan
        return {"logits": logits}

    runner = Speaker(generated.tokens, answer)
    cell = judged(generated, runner)[-1]
    assert cell.case == "bad task ids, step"
    assert (cell.verdict, cell.reason) == ("failed" if reason else "passed", reason)


def test_bad_ids_that_are_refused_are_as_good(generated: GeneratedTokens) -> None:
    """A runtime that stops is no worse than one that says NaN."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineRunError("task_ids: a bad one")

    runner = Speaker(generated.tokens, answer)
    cell = judged(generated, runner)[-1]
    assert cell.case == "bad task ids, step"
    assert cell.verdict == "passed"


def test_steps_follow_the_mixed_and_the_long_batch(cases: list[Case]) -> None:
    """Prompts leave room for the steps; the tokens to feed are inside the vocabulary."""
    found = step_cases(cases, RowLimits(3, 31, 40))
    assert [case.name for case in found] == [
        f"{STEPS} steps, mixed tasks", f"{STEPS} steps, batch 7 x 40"
    ]  # fmt: skip
    for case in found:
        assert case.inputs["input_ids"].shape[1] <= 40 - STEPS
        tokens = case.inputs[NEW_TOKENS]
        assert tokens.shape == (len(case.task_ids), STEPS)
        assert 0 <= tokens.min() <= tokens.max() < 31


def test_the_oracle_speaks_after_the_first_prompts_with_steps(generated: GeneratedTokens) -> None:
    """Its margins are those of its own tokens; without steps it says nothing."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert inputs[NEW_TOKENS].tolist() == generated.tokens.tolist()
        logits = np.zeros((6, STEPS, 4))
        logits[..., 2], logits[..., 1] = 3.0, 2.5
        return {"logits": logits}

    runner = Speaker(generated.tokens, answer)
    assert isinstance(runner, Generator)
    with runner:
        found = tokens_of_oracle(runner, [generated.case])
        assert tokens_of_oracle(runner, []) is None
    assert found is not None
    assert (found.margins == 0.5).all()
    assert tokens_of_oracle(fakes.FakeRunner(answer), [generated.case]) is None


def test_positions_are_counted_from_the_mask() -> None:
    """Padding is at position 0, as generate has it."""
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
