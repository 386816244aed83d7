"""Names for the outputs of a model whose tasks' heads differ in what they compute.

    what a head gives                                   output
    hidden states, no head at all                       last_hidden_state
    logits for every token                              token_classification
    logits for a row, all its tasks regressions         regression
    logits for a row, any other                         classification

Where all tasks have one computation there is one output, ``logits``, however many labels each
has. Two outputs of one word (heads of one and of two layers) are told apart by a number, the
second being ``classification_2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtl_export.checkpoint.checkpoint import Readout, TaskKind
from mtl_export.checkpoint.sentence_embedding import HIDDEN_STATES

BARE = Readout("tokens", (), is_bare=True)


def named_outputs(heads: Sequence[tuple[Readout, TaskKind]]) -> tuple[Readout, ...]:
    """Return each task's readout under the name of its output.

    Args:
        heads: Each task's readout, unnamed, and its kind; not all readouts are equal.
    """
    names: dict[tuple[Readout, str], str] = {}
    for readout, kind in heads:
        word = _word(readout, kind)
        if (readout, word) not in names:
            used = sum(other == word for _, other in names)
            names[readout, word] = f"{word}_{used + 1}" if used else word
    return tuple(
        replace(readout, name=names[readout, _word(readout, kind)]) for readout, kind in heads
    )


def _word(readout: Readout, kind: TaskKind) -> str:
    if readout.is_bare:
        return HIDDEN_STATES
    if readout.pooling == "tokens":
        return "token_classification"
    return "regression" if kind == "regression" else "classification"
