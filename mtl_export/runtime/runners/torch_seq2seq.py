"""The PyTorch side of ``seq2seq``: the oracle and a merged folder, as encoder-decoders.

Tokens are those of transformers' own ``generate``; logits after given tokens come from one
pass over all of them, without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import LOGITS, TASK_IDS
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner, errors_of_model
from mtl_export.runtime.runners.seq2seq import (
    decoder_inputs,
    encoder_inputs,
    first_token,
    folder_first_token,
)
from mtl_export.runtime.saturating_casts import SaturatingCasts


class OracleSeq2SeqRunner(OracleRunner):
    """The unmerged model; inputs and outputs as in ``seq2seq``."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see ``seq2seq``.

        Raises:
            EngineRunError: A task id is outside [0, T).
        """
        passed = _passed(inputs, first_token(self._bound.base.config))
        return {LOGITS: super().infer({**passed, TASK_IDS: inputs[TASK_IDS]})[LOGITS]}

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return the tokens of transformers' ``generate``; no token ends a row."""
        start = first_token(self._bound.base.config)

        def generate(model: Any, rows: Array) -> Array:
            own = {name: value[rows] for name, value in encoder_inputs(inputs).items()}
            return _generated(model, own, start, max_new_tokens)

        return self._generated_by_task(inputs[TASK_IDS], max_new_tokens, generate)


class MergedSeq2SeqRunner(MergedRunner):
    """A merged folder; inputs and outputs as in ``seq2seq``."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see ``seq2seq``."""
        start = folder_first_token(self._folder)
        return {LOGITS: super().infer(_passed(inputs, start))[LOGITS]}

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return the tokens of transformers' ``generate``; no token ends a row."""
        start = folder_first_token(self._folder)
        return _generated(self._model, encoder_inputs(inputs), start, max_new_tokens)


def _passed(inputs: Mapping[str, Array], start: int) -> dict[str, Array]:
    tokens = decoder_inputs(inputs[NEW_TOKENS], start)
    return {**encoder_inputs(inputs), "decoder_input_ids": tokens}


def _generated(model: Any, inputs: Mapping[str, Array], start: int, max_new_tokens: int) -> Array:
    from transformers import GenerationConfig, GenerationMixin

    # Not the model's own: what it says of ends and of sampling is no matter of the weights.
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    given = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in given.items()}
    with (
        torch.inference_mode(), SaturatingCasts(), quiet_transformers(),
        errors_of_model(model, given),
    ):  # fmt: skip
        # Not the class's own: Whisper's cuts audio up and puts prompts before the tokens.
        generate: Any = GenerationMixin.generate
        tokens: Array = generate(
            model, **given, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        ).numpy()
    return tokens[:, 1:]
