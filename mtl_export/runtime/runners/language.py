"""Runners of causal language models, for those who compare: prompts and new tokens to logits.

    input_ids, attention_mask [B, S]                      -> logits [B, S, L]
    input_ids, attention_mask [B, S], new_tokens [B, N]   -> logits [B, N, L]

B rows, S prompt tokens, N new ones, L vocabulary. Row n of the second kind is what follows the
prompt and the first n new tokens. The oracle computes it anew from all tokens, without a
cache; a graph steps through ``prefill`` and ``decode``. So every step's cache is compared with
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, LOGITS, TASK_IDS
from mtl_export.runtime.generation import Decoding, GreedyDecoder, left_padded
from mtl_export.runtime.ort import OrtPart, OrtRunner, open_session, run_session

NEW_TOKENS = "new_tokens"
PROMPT_TASK_IDS = "prompt_task_ids"


@runtime_checkable
class Generator(Protocol):
    """A runner that also generates."""

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return exactly so many greedy tokens after each prompt, int64 ``[B, N]``."""
        ...


class OrtLanguageRunner(OrtRunner):
    """``prefill.onnx`` and ``decode.onnx``.

    ``prompt_task_ids`` among the inputs are the tasks of the prompts where those of the new
    tokens differ.

    Args:
        path: ``prefill.onnx``, the other beside it.
        decode: Name of the other.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
    """

    def __init__(self, path: Path, *, decode: str, threads: int = 0) -> None:
        super().__init__(path, threads=threads)
        self._decode_path = path.with_name(decode)
        self._decode: Any = None

    def __enter__(self) -> OrtLanguageRunner:
        """Open both sessions.

        Raises:
            BackendMissingError: onnxruntime is not installed.
            EngineRunError: onnxruntime refuses a file.
        """
        super().__enter__()
        self._decode = open_session(self._decode_path, threads=self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        """Close both sessions."""
        super().__exit__()
        self._decode = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see the module.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        if NEW_TOKENS not in inputs:
            values = run_session(self._session, self._path, inputs, [LOGITS])
            return {LOGITS: values[LOGITS].astype(np.float64)}
        ids = inputs.get(TASK_IDS)
        tokens, prompts = inputs[NEW_TOKENS], inputs.get(PROMPT_TASK_IDS, ids)
        parts = self._parts()
        decoding = Decoding(*parts, inputs[INPUT_IDS], inputs[ATTENTION_MASK], prompts)
        decoding.route(ids)
        steps = [decoding.logits]
        for step in range(tokens.shape[1] - 1):
            decoding.feed(tokens[:, step])
            steps.append(decoding.logits)
        return {LOGITS: np.stack(steps, axis=1).astype(np.float64)}

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return greedy tokens ``[B, N]``; no token ends a row."""
        decoder = GreedyDecoder(*self._parts(), eos_token_ids=(), pad_token_id=0)
        return decoder.generate(
            inputs[INPUT_IDS],
            inputs[ATTENTION_MASK],
            task_ids=inputs.get(TASK_IDS),
            max_new_tokens=max_new_tokens,
        )

    def _parts(self) -> tuple[OrtPart, OrtPart]:
        return OrtPart(self._session, self._path), OrtPart(self._decode, self._decode_path)


def joined_inputs(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return prompts and new tokens as one left-padded batch.

    The last token is left out: what follows it is not asked for.
    """
    ids, mask = left_padded(inputs[INPUT_IDS], inputs[ATTENTION_MASK])
    tokens = inputs[NEW_TOKENS][:, :-1]
    ids = np.concatenate([ids, tokens], axis=1)
    mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
    return {INPUT_IDS: ids, ATTENTION_MASK: mask}


def positions(mask: Array) -> Array:
    """Return each token's place in its row, ``[B, S]``, as transformers' ``generate`` counts."""
    counted: Array = np.where(mask == 0, 0, mask.cumsum(axis=1) - 1)
    return counted
