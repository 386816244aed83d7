"""Which of a model's outputs are answers: what graphs give and parity judges.

logits                 a model with a head
logits, pred_boxes     one that also says where: boxes and masks of what it found
all                    a bare encoder, which has no logits
"""

from __future__ import annotations

from collections.abc import Iterable

from mtl_export.names import LOGITS

# What stands beside logits and is of the same rows.
BESIDE_LOGITS = "pred_"


def answers_among(outputs: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the answers, in order; hidden states beside logits are none."""
    names = tuple(outputs)
    if LOGITS not in names:
        return names
    return tuple(name for name in names if name == LOGITS or name.startswith(BESIDE_LOGITS))
