"""The PyTorch side of ``language``: the oracle and a merged folder, as language models.

Tokens are those of transformers' own ``generate``; logits after given tokens come from one
pass over all of them, without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, LOGITS, TASK_IDS
from mtl_export.runtime.generation import left_padded
from mtl_export.runtime.runners.language import NEW_TOKENS, joined_inputs, positions
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner, errors_of_model
from mtl_export.runtime.saturating_casts import SaturatingCasts


class OracleLanguageRunner(OracleRunner):
    """The unmerged model; inputs and outputs as in ``language``."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see ``language``.

        Raises:
            EngineRunError: A task id is outside [0, T).
        """
        passed = _passed(inputs, self._models[0].model)
        answers = super().infer({**passed, TASK_IDS: inputs[TASK_IDS]})
        return _asked_for(answers, inputs)

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return the tokens of transformers' ``generate``; no token ends a row."""

        def generate(model: Any, rows: Array) -> Array:
            own = {name: inputs[name][rows] for name in (INPUT_IDS, ATTENTION_MASK)}
            return _generated(model, own, max_new_tokens)

        return self._generated_by_task(inputs[TASK_IDS], max_new_tokens, generate)


class MergedLanguageRunner(MergedRunner):
    """A merged folder; inputs and outputs as in ``language``."""

    def __enter__(self) -> MergedLanguageRunner:
        """Load the folder.

        Raises:
            BaseModelError: A weight is missing in the folder or has another shape.
        """
        super().__enter__()
        return self

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``logits``; see ``language``."""
        return _asked_for(super().infer(_passed(inputs, self._model)), inputs)

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return the tokens of transformers' ``generate``; no token ends a row."""
        return _generated(self._model, inputs, max_new_tokens)


def _passed(inputs: Mapping[str, Array], model: Any) -> dict[str, Array]:
    """Return what the model is given: all tokens at once, and their positions if it takes them."""
    texts = {name: inputs[name] for name in (INPUT_IDS, ATTENTION_MASK)}
    given = joined_inputs(inputs) if NEW_TOKENS in inputs else texts
    given["position_ids"] = positions(given[ATTENTION_MASK])
    accepted = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in accepted}


def _asked_for(outputs: dict[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the logits of every prompt token, or of those that follow the prompt."""
    count = inputs[NEW_TOKENS].shape[1] if NEW_TOKENS in inputs else 0
    return {LOGITS: outputs[LOGITS][:, -count:]}


def _generated(model: Any, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
    from transformers import GenerationConfig

    ids, mask = left_padded(inputs[INPUT_IDS], inputs[ATTENTION_MASK])
    # Not the model's own: what it says of ends and of sampling is no matter of the weights.
    model.generation_config = GenerationConfig()
    given = {INPUT_IDS: torch.from_numpy(ids), ATTENTION_MASK: torch.from_numpy(mask)}
    # States of recurrent models are not caches, and some of transformers 5.23 do not fit (xLSTM).
    is_recurrent = "cache_params" in inspect.signature(model.forward).parameters
    with (
        torch.inference_mode(), SaturatingCasts(), quiet_transformers(),
        errors_of_model(model, given),
    ):  # fmt: skip
        tokens: Array = model.generate(
            **given, do_sample=False, max_new_tokens=max_new_tokens, use_cache=not is_recurrent
        ).numpy()
    return tokens[:, ids.shape[1] :]
