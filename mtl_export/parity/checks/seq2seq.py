"""What encoder-decoders are compared on: every batch with tokens that the decoder reads.

    input_ids, attention_mask, task_ids  ->  the same, what else the encoder reads, new_tokens

All batches are of full tokens: the decoder has no padding, and each of its logits counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_export.checkpoint.own_classes import own_class
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import DECODER_INPUT_IDS
from mtl_export.parity.cases import Case
from mtl_export.parity.checks.generation import LONG, STEPS
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.seq2seq import first_token

# Of the long batches; odd, and more than is ever traced.
LONG_STEPS = 13


def decoder_cases(
    cases: Sequence[Case], model_class: str, config: Mapping[str, Any], *, vocabulary: int
) -> list[Case]:
    """Return ``cases`` with seeded decoder tokens, and with what else the encoder reads.

    Args:
        cases: From ``cases.build_cases``.
        model_class: The class of the model.
        config: Its ``config.json``.
        vocabulary: Token ids lie in [0, vocabulary).
    """
    generator = np.random.default_rng(3)
    own = own_class(model_class)
    found = []
    for case in cases:
        rows = len(case.task_ids)
        count = LONG_STEPS if case.name.startswith(LONG) else STEPS
        tokens = generator.integers(0, vocabulary, (rows, count), dtype=np.int64)
        others = own.seeded_inputs(config, rows) if own is not None else {}
        inputs = {NEW_TOKENS: tokens, **case.inputs, **others}
        if DECODER_INPUT_IDS in inputs:
            inputs[NEW_TOKENS] = _following(inputs.pop(DECODER_INPUT_IDS), first_token(config))
        found.append(Case(case.name, inputs, case.preset))
    return found


def _following(decoder_ids: Array, start: int) -> Array:
    """Return new tokens ``[B, N]`` after which the decoder has read all that a user gave it."""
    begun = decoder_ids[:, 1:] if (decoder_ids[:, 0] == start).all() else decoder_ids
    return np.pad(begun, ((0, 0), (0, 1)))  # what follows the last token is not asked for
