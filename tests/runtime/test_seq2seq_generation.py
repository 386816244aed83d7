"""Greedy decoding over three functions in place of graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, UsageError
from mtl_export.runtime.seq2seq_generation import Seq2SeqGreedyDecoder, Seq2SeqParts
from mtl_export.runtime.token_rules import TokenRules

VOCABULARY, START, EOS, PAD = 11, 5, 2, 0
ROWS = {"input_ids": np.array([[7, 8], [9, 3], [4, 4]])}


class Graphs:
    """Graphs that say what follows from the row's first token and all tokens so far.

    The next token is ``(first + sum of tokens + task) % VOCABULARY``: a cache that loses or
    repeats a token, or a row that changes its place, changes all that follows.
    """

    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []

    def parts(self) -> Seq2SeqParts:
        """Return them."""
        return Seq2SeqParts(self.encoder, self.decoder, self.with_past)

    def encoder(self, inputs: Mapping[str, Any], /) -> dict[str, Any]:
        """Read the rows."""
        assert set(inputs) == {"input_ids", "attention_mask", "task_ids"}
        return {"last_hidden_state": inputs["input_ids"][:, :1].astype(float)}

    def decoder(self, inputs: Mapping[str, Any], /) -> dict[str, Any]:
        """Run the first tokens."""
        states = inputs["encoder_hidden_states"][:, 0]
        tokens = inputs["decoder_input_ids"]
        answer = self._answer(states, tokens.sum(axis=1), inputs)
        return {**answer, "present.0.encoder.key": states}

    def with_past(self, inputs: Mapping[str, Any], /) -> dict[str, Any]:
        """Run one more token."""
        self.steps.append(inputs)
        assert inputs["decoder_input_ids"].shape[1] == 1
        assert "encoder_hidden_states" not in inputs
        total = inputs["past_key_values.0.decoder.key"] + inputs["decoder_input_ids"][:, 0]
        return self._answer(inputs["past_key_values.0.encoder.key"], total, inputs)

    def _answer(self, states: Array, total: Array, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert "encoder_attention_mask" in inputs
        ids = inputs["task_ids"]
        following = ((states + total + ids) % VOCABULARY).astype(int)
        logits = np.eye(VOCABULARY)[following]
        logits[ids > 1] = np.nan
        return {"logits": logits[:, None], "present.0.decoder.key": total}


def expected(first: int, task: int, count: int) -> list[int]:
    """Return what one row says, by the definition above."""
    said: list[int] = []
    total = START
    while len(said) < count:
        token = (first + total + task) % VOCABULARY
        said.append(token)
        total += token
        if token == EOS:
            said += [PAD] * (count - len(said))
    return said


def test_rows_end_on_their_own_and_keep_their_task() -> None:
    """Each row is what it is alone; one that ended is padded; all parts are fed alike."""
    graphs = Graphs()
    rules = TokenRules(start=START, eos=(EOS,), pad=PAD)
    ids = np.array([0, 1, 0])
    found = Seq2SeqGreedyDecoder(graphs.parts(), rules).generate(
        ROWS, task_ids=ids, max_new_tokens=6
    )
    wanted = [expected(row[0], task, 6) for row, task in zip(ROWS["input_ids"], ids, strict=True)]
    length = max(len(row) - row.count(PAD) if EOS in row else 6 for row in wanted)
    assert found.tolist() == [row[:length] for row in wanted]
    assert all((step["task_ids"] == ids).all() for step in graphs.steps)


def test_no_step_is_run_for_what_nobody_asked() -> None:
    """N tokens cost the decoder once and N - 1 steps."""
    graphs = Graphs()
    decoder = Seq2SeqGreedyDecoder(graphs.parts(), TokenRules(start=START))
    assert decoder.generate(ROWS, task_ids=np.zeros(3, int), max_new_tokens=4).shape == (3, 4)
    assert len(graphs.steps) == 3


def test_a_task_that_is_none_is_refused() -> None:
    """NaN is no token: the row is named."""
    decoder = Seq2SeqGreedyDecoder(Graphs().parts(), TokenRules(start=START))
    with pytest.raises(EngineRunError, match=r"\[1\]"):
        decoder.generate(ROWS, task_ids=np.array([0, 9, 1]), max_new_tokens=2)


@pytest.mark.parametrize(("count", "limit"), [(0, None), (9, 8), (2.5, None), (2.5, 8), (True, 8)])
def test_lengths_that_cannot_be_are_refused(count: Any, limit: int | None) -> None:
    """None at all, or more than the decoder has positions."""
    decoder = Seq2SeqGreedyDecoder(Graphs().parts(), TokenRules(start=START), max_length=limit)
    with pytest.raises(UsageError, match="max_new_tokens"):
        decoder.generate(ROWS, task_ids=np.zeros(3, int), max_new_tokens=count)


def test_a_decoder_must_know_how_to_begin() -> None:
    """Without a first token there is nothing to generate from."""
    with pytest.raises(UsageError, match="decoder_start_token_id"):
        Seq2SeqGreedyDecoder(Graphs().parts(), TokenRules())


def test_a_text_of_padding_is_refused() -> None:
    """As by causal language models: there is nothing to answer."""
    decoder = Seq2SeqGreedyDecoder(Graphs().parts(), TokenRules(start=START))
    masked = {**ROWS, "attention_mask": np.array([[1, 1], [0, 0], [0, 1]])}
    with pytest.raises(UsageError, match="prompts: row 1 has no token"):
        decoder.generate(masked, task_ids=np.zeros(3, int), max_new_tokens=2)
