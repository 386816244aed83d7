"""Runners of encoder-decoders, for those who compare: inputs and new tokens to logits.

    input_ids, attention_mask [B, S], what else the encoder reads, new_tokens [B, N]
        -> logits [B, N, L]

B rows, S tokens of the encoder, N of the decoder, L vocabulary. Row n is what follows the
decoder's first token and the first n new ones. The oracle computes it anew from all
tokens, without a cache; the graphs read the first half in ``decoder`` and step through the rest
in ``decoder_with_past``. So every part and every step's cache is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.names import LOGITS, TASK_IDS
from mtl_export.runtime.ort import OrtPart, open_session
from mtl_export.runtime.runners.language import NEW_TOKENS, PROMPT_TASK_IDS
from mtl_export.runtime.seq2seq_generation import (
    Seq2SeqDecoding,
    Seq2SeqGreedyDecoder,
    Seq2SeqParts,
)
from mtl_export.runtime.token_rules import CONFIG_FILE, TokenRules, read_settings

FILES = ("encoder.onnx", "decoder.onnx", "decoder_with_past.onnx")


class OrtSeq2SeqRunner:
    """``encoder.onnx``, ``decoder.onnx`` and ``decoder_with_past.onnx``.

    ``prompt_task_ids`` among the inputs are the tasks of the encoder and of the decoder's
    first token where those of the new tokens differ.

    Args:
        folder: Holds the three, and the config that names the decoder's first token.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        self.name = "onnxruntime"
        self._folder, self._threads = folder, threads
        self._parts: Seq2SeqParts | None = None
        self._start = 0

    def __enter__(self) -> OrtSeq2SeqRunner:
        """Open the sessions.

        Raises:
            BackendMissingError: onnxruntime is not installed.
            EngineRunError: onnxruntime refuses a file, or the config cannot be read.
        """
        paths = [self._folder / name for name in FILES]
        self._parts = Seq2SeqParts(
            *(OrtPart(open_session(path, threads=self._threads), path) for path in paths)
        )
        self._start = folder_first_token(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the sessions."""
        self._parts = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see the module.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        tokens = decoder_inputs(inputs[NEW_TOKENS], self._start)
        ids = inputs.get(TASK_IDS)
        prompts = inputs.get(PROMPT_TASK_IDS, ids)
        first = 1 if PROMPT_TASK_IDS in inputs else max(1, tokens.shape[1] // 2)
        decoding = Seq2SeqDecoding(self._opened, encoder_inputs(inputs), prompts, tokens[:, :first])
        decoding.route(ids)
        steps = [decoding.logits]
        for step in range(first, tokens.shape[1]):
            decoding.feed(tokens[:, step])
            steps.append(decoding.logits)
        return {LOGITS: np.concatenate(steps, axis=1).astype(np.float64)}

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return greedy tokens ``[B, N]``; no token ends a row."""
        decoder = Seq2SeqGreedyDecoder(self._opened, TokenRules(start=self._start))
        return decoder.generate(
            encoder_inputs(inputs), task_ids=inputs.get(TASK_IDS), max_new_tokens=max_new_tokens
        )

    @property
    def _opened(self) -> Seq2SeqParts:
        if self._parts is None:
            raise RuntimeError("enter the runner before calling infer")
        return self._parts


def encoder_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the encoder reads."""
    others = {NEW_TOKENS, PROMPT_TASK_IDS, TASK_IDS}
    return {name: value for name, value in inputs.items() if name not in others}


def decoder_inputs(new_tokens: Array, start: int) -> Array:
    """Return what the decoder reads, ``[B, N]``; what follows the last token is not asked for."""
    starts = np.full_like(new_tokens[:, :1], start)
    return np.concatenate([starts, new_tokens[:, :-1]], axis=1)


def first_token(config: Mapping[str, Any]) -> int:
    """Return what the decoder begins with; where nothing says, any token that all begin with."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return 0


def folder_first_token(folder: Path) -> int:
    """Return the first token of the model in ``folder``.

    Raises:
        EngineRunError: Its config cannot be read.
    """
    return first_token(read_settings(folder / CONFIG_FILE))
