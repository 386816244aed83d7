"""Three graphs of an encoder-decoder into tokens: greedy decoding, every row under its own task.

    encoder(input_ids, attention_mask [B, S], ...)  ->  last_hidden_state [B, S, d]
    decoder(decoder_input_ids [B, D], encoder_hidden_states, encoder_attention_mask)
        ->  logits [B, D, L], present.<layer>.decoder|encoder.key|value
    decoder_with_past(decoder_input_ids [B, 1], encoder_attention_mask, past_key_values...)
        ->  logits [B, 1, L], present.<layer>.decoder.key|value

B rows, S tokens of the encoder, D of the decoder, L vocabulary. Graphs of all tasks also take
``task_ids`` [B]. Needs numpy alone; what runs the graphs is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.errors import UsageError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST_PREFIX, PRESENT_PREFIX
from mtl_export.runtime.arguments import count_of
from mtl_export.runtime.generation import GreedyDecoder, Part, next_tokens, refuse_empty
from mtl_export.runtime.token_rules import TokenRules

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

MASK, SOURCE_MASK, TOKENS = "attention_mask", "encoder_attention_mask", "decoder_input_ids"


@dataclass(frozen=True)
class Seq2SeqParts:
    """The three graphs, ready to run.

    Attributes:
        encoder: Reads the inputs.
        decoder: Runs the decoder's first tokens.
        with_past: Runs one more token of every row.
    """

    encoder: Part
    decoder: Part
    with_past: Part


class Seq2SeqDecoding:
    """One batch on its way: a cache, and the logits of each row's next token.

    Args:
        parts: The graphs.
        inputs: The encoder's, ``[B, ...]``; a missing ``attention_mask`` is ones.
        task_ids: int64 ``[B]``; None for graphs of one task.
        tokens: int64 ``[B, D]``, what the decoder begins with.

    Attributes:
        logits: ``[B, D, L]``: of what the decoder read last, all of D at first, then one.
    """

    def __init__(
        self,
        parts: Seq2SeqParts,
        inputs: Mapping[str, Array],
        task_ids: Array | None,
        tokens: Array,
    ) -> None:
        self._with_past = parts.with_past
        self.route(task_ids)
        mask = inputs.get(MASK, np.ones_like(inputs["input_ids"]))
        encoded = parts.encoder({**inputs, MASK: mask, **self._routing})
        # An encoder that reads more than text says itself what of its states counts.
        self._cache: dict[str, Any] = {SOURCE_MASK: encoded.get(SOURCE_MASK, mask)}
        states = {"encoder_hidden_states": encoded["last_hidden_state"]}
        self._take(parts.decoder({TOKENS: tokens, **states, **self._cache, **self._routing}))

    def route(self, task_ids: Array | None) -> None:
        """Let the rows go on under these tasks, int64 ``[B]``."""
        self._routing = {} if task_ids is None else {"task_ids": task_ids}

    def feed(self, tokens: Array) -> None:
        """Append one token to every row, int64 ``[B]``."""
        self._take(self._with_past({TOKENS: tokens[:, None], **self._cache, **self._routing}))

    def _take(self, outputs: Mapping[str, Any]) -> None:
        self.logits: Array = outputs[LOGITS]
        # The encoder's keys and values come once and stay.
        self._cache |= {
            PAST_PREFIX + name.removeprefix(PRESENT_PREFIX): value
            for name, value in outputs.items()
            if name.startswith(PRESENT_PREFIX)
        }


class Seq2SeqGreedyDecoder:
    """Greedy generation over the three graphs of an encoder-decoder.

    The tokens are those of transformers' ``generate(do_sample=False, num_beams=1)`` with the
    same settings.

    Args:
        parts: The graphs.
        rules: How generation begins and ends.
        max_length: Most tokens that the decoder reads: its positions. None: no limit.

    Raises:
        UsageError: The rules name no token to begin with.
    """

    def __init__(
        self, parts: Seq2SeqParts, rules: TokenRules, *, max_length: int | None = None
    ) -> None:
        if rules.start is None:
            raise UsageError(
                "decoder_start_token_id: neither the generation settings nor the config have one",
                expected="the token that the decoder begins with",
                fix="Add it to generation_config.json",
            )
        self._parts, self._rules, self._max_length = parts, rules, max_length
        self._start = rules.start

    def generate(
        self,
        inputs: Mapping[str, Array],
        *,
        task_ids: Array | None = None,
        max_new_tokens: int,
    ) -> Array:
        """Return the new tokens only, without the one the decoder begins with.

        Args:
            inputs: The encoder's, ``[B, ...]``; a missing ``attention_mask`` is ones.
            task_ids: int64 ``[B]``, each row's task; None for graphs of one task.
            max_new_tokens: A row ends here at the latest.

        Returns:
            int64 ``[B, N]``, N <= max_new_tokens: up to the token that ended the last row.
            A row keeps the token that ended it; padding follows.

        Raises:
            UsageError: A text without tokens, or more new ones than the model has positions, or
                ``max_new_tokens`` is no whole number of at least 1.
            EngineRunError: A row's logits are NaN: no task has its id.
        """
        # The last new token is never read, so as many as there are positions are possible.
        max_new_tokens = count_of(
            "max_new_tokens", max_new_tokens, self._max_length, "the decoder has no more positions"
        )
        if MASK in inputs:
            refuse_empty(inputs[MASK], "what is said follows from what was read")
        said = np.full((len(inputs["input_ids"]), 1), self._start, np.int64)
        decoding = Seq2SeqDecoding(self._parts, inputs, task_ids, said)
        ended = np.zeros(len(said), np.bool_)
        for left in range(max_new_tokens, 0, -1):
            logits = self._rules.applied(decoding.logits[:, -1], said, begin=1, last=left == 1)
            tokens = np.where(ended, self._rules.pad, next_tokens(logits))
            said = np.concatenate([said, tokens[:, None]], axis=1)
            ended |= np.isin(tokens, self._rules.eos)
            if ended.all():
                break
            if left > 1:
                decoding.feed(tokens)
        return said[:, 1:]


def generated(
    parts: Sequence[Part],
    inputs: Mapping[str, Array],
    task_ids: Array | None,
    rules: TokenRules,
    *,
    max_new_tokens: int,
    limit: int | None,
) -> list[list[int]]:
    """Return the new tokens of each row, greedily decoded by the graphs of a language model.

    Args:
        parts: prefill and decode, or encoder, decoder and decoder_with_past.
        inputs: The prompts.
        task_ids: ``[B]`` int64; None where graphs take none.
        rules: Which tokens end and fill rows, and are forbidden.
        max_new_tokens: A row ends here at the latest.
        limit: The longest row, prompt and all; None for no limit.
    """
    if len(parts) == 3:
        seq2seq = Seq2SeqGreedyDecoder(Seq2SeqParts(*parts), rules, max_length=limit)
        tokens = seq2seq.generate(inputs, task_ids=task_ids, max_new_tokens=max_new_tokens)
    else:
        causal = GreedyDecoder(
            *parts,
            eos_token_ids=rules.eos,
            pad_token_id=rules.pad,
            max_length=limit,
            rules=rules,
        )
        tokens = causal.generate(
            inputs[INPUT_IDS],
            inputs[ATTENTION_MASK],
            task_ids=task_ids,
            max_new_tokens=max_new_tokens,
        )
    listed: list[list[int]] = tokens.tolist()
    return listed
