"""Two graphs with a KV cache into tokens: greedy decoding, every row under its own task.

    prefill(input_ids [B, S], attention_mask [B, S], task_ids [B])
        -> logits [B, S, L], present.<layer>.key|value [B, heads, S, head_dim]
    decode(input_ids [B, 1], attention_mask [B, P + 1], past_key_values.<layer>.key|value [B,
           heads, P, head_dim], task_ids [B])
        -> logits [B, 1, L], present.<layer>.key|value [B, heads, P + 1, head_dim]

B rows, S prompt tokens, P tokens in the cache, L vocabulary. Graphs of one task take no
``task_ids``. The graphs derive positions from the mask, as transformers' ``generate`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mtl_export.errors import EngineRunError, UsageError
from mtl_export.names import LOGITS, PAST_PREFIX, PRESENT_PREFIX
from mtl_export.runtime.arguments import count_of

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array
    from mtl_export.runtime.token_rules import TokenRules


class Part(Protocol):
    """One graph, ready to run.

    ``logits`` must come back as an array in the graph's own dtype or a wider one. What is
    called ``present.…`` is handed to the next call as ``past_key_values.…`` untouched and
    never looked at: it may stay wherever the runtime keeps it.
    """

    def __call__(self, inputs: Mapping[str, Any], /) -> Mapping[str, Any]:
        """Return the outputs by name."""
        ...


class Decoding:
    """One batch on its way: a cache, and the logits of each row's next token.

    Args:
        prefill: Runs the prompts.
        decode: Runs one more token of every row.
        input_ids: int64 ``[B, S]``.
        attention_mask: int64 ``[B, S]``, 1 for tokens; padding may be on either side.
        task_ids: int64 ``[B]``; None for graphs of one task.

    Attributes:
        logits: ``[B, L]``, of the token that comes next.
    """

    def __init__(
        self,
        prefill: Part,
        decode: Part,
        input_ids: Array,
        attention_mask: Array,
        task_ids: Array | None,
    ) -> None:
        self._decode = decode
        self.route(task_ids)
        ids, self._mask = left_padded(input_ids, attention_mask)
        self._take(prefill({"input_ids": ids, "attention_mask": self._mask, **self._routing}))

    def feed(self, tokens: Array) -> None:
        """Append one token to every row, int64 ``[B]``."""
        one = np.ones((len(tokens), 1), self._mask.dtype)
        self._mask = np.concatenate([self._mask, one], axis=1)
        inputs = {"input_ids": tokens[:, None], "attention_mask": self._mask}
        self._take(self._decode({**inputs, **self._cache, **self._routing}))

    def route(self, task_ids: Array | None) -> None:
        """Let the rows go on under these tasks, int64 ``[B]``."""
        self._routing = {} if task_ids is None else {"task_ids": task_ids}

    def _take(self, outputs: Mapping[str, Any]) -> None:
        self.logits: Array = outputs[LOGITS][:, -1]
        self._cache = {
            PAST_PREFIX + name.removeprefix(PRESENT_PREFIX): value
            for name, value in outputs.items()
            if name.startswith(PRESENT_PREFIX)
        }


class GreedyDecoder:
    """Greedy generation over the two graphs of a causal language model.

    The tokens are those of transformers' ``generate(do_sample=False, num_beams=1)`` on
    left-padded prompts, with the settings that ``rules`` hold.

    Args:
        prefill: Runs the prompts.
        decode: Runs one more token of every row.
        eos_token_ids: A row ends after any of these; empty: only at the length asked for.
        pad_token_id: Fills rows that have ended.
        max_length: Most tokens that a row may have, prompt included: the model's positions.
            None: no limit.
        rules: What the generation settings force and forbid; None: nothing.
    """

    def __init__(
        self,
        prefill: Part,
        decode: Part,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_length: int | None = None,
        rules: TokenRules | None = None,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._eos = np.array(sorted(set(eos_token_ids)), np.int64)
        self._pad = pad_token_id
        self._max_length = max_length
        self._rules = rules

    def generate(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        task_ids: Array | None = None,
        max_new_tokens: int,
    ) -> Array:
        """Return the new tokens only.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, S]``, padding on either side; None: no padding.
            task_ids: int64 ``[B]``, each row's task; None for graphs of one task.
            max_new_tokens: A row ends here at the latest.

        Returns:
            int64 ``[B, N]``, N <= max_new_tokens: up to the token that ended the last row.
            A row keeps the token that ended it; padding follows.

        Raises:
            UsageError: A prompt without tokens, or one too long for so many new tokens, or
                ``max_new_tokens`` is no whole number of at least 1.
            EngineRunError: A row's logits are NaN: no task has its id.
        """
        max_new_tokens = count_of("max_new_tokens", max_new_tokens)
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._refuse_lengths(mask, max_new_tokens)
        decoding = Decoding(self._prefill, self._decode, input_ids, mask, task_ids)
        ended = np.zeros(len(input_ids), np.bool_)
        said, places = left_padded(input_ids, mask)
        begin, padding = said.shape[1], (places == 0).sum(axis=1)
        while True:
            logits = decoding.logits
            if self._rules is not None:
                last = said.shape[1] - begin == max_new_tokens - 1
                logits = self._rules.applied(logits, said, begin=begin, last=last, padding=padding)
            tokens = np.where(ended, self._pad, next_tokens(logits))
            said = np.concatenate([said, tokens[:, None]], axis=1)
            ended |= np.isin(tokens, self._eos)
            if ended.all() or said.shape[1] - begin == max_new_tokens:
                return said[:, begin:]
            decoding.feed(tokens)

    def _refuse_lengths(self, mask: Array, max_new_tokens: int) -> None:
        refuse_empty(mask, "the first new token follows from the prompt's last")
        lengths = mask.sum(axis=1)
        longest = int(lengths.max()) + max_new_tokens
        if self._max_length is not None and longest > self._max_length:
            raise UsageError(
                f"row {int(lengths.argmax())}: {int(lengths.max())} prompt tokens and "
                f"{max_new_tokens} new ones",
                expected=(
                    f"at most {self._max_length} together, because the model has no more positions"
                ),
                fix="Ask for fewer tokens or shorten the prompt",
            )


def refuse_empty(attention_mask: Array, why: str) -> None:
    """Refuse prompts ``[B, S]`` of which one is padding only.

    Raises:
        UsageError: One is, or there are none.
    """
    empty = np.flatnonzero(~(attention_mask != 0).any(axis=1))
    if attention_mask.size == 0 or empty.size:
        raise UsageError(
            f"prompts: row {int(empty[0])} has no token" if empty.size else "prompts: none",
            expected=f"at least one token in every row, because {why}",
        )


def left_padded(input_ids: Array, attention_mask: Array) -> tuple[Array, Array]:
    """Return both ``[B, S]`` with every row's tokens moved to its end, in order.

    New tokens then follow the prompt without a gap, which a sliding window would count.
    """
    order = np.argsort(attention_mask != 0, axis=1, kind="stable")
    ids, mask = (np.take_along_axis(a, order, axis=1) for a in (input_ids, attention_mask))
    return ids, mask


def next_tokens(logits: Array) -> Array:
    """Return the largest logit's token of each row, int64 [B], from ``[B, L]``.

    Raises:
        EngineRunError: A row is NaN, which would otherwise look like a token.
    """
    poisoned = np.isnan(logits).any(axis=1)
    if poisoned.any():
        raise EngineRunError(
            f"rows {np.flatnonzero(poisoned).tolist()}: their logits are NaN",
            expected="numbers, because graphs answer so to a task id that no task has",
            fix="Check task_ids",
        )
    tokens: Array = logits.argmax(axis=1)
    return tokens
