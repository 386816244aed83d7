"""Any checkpoint as our own folder, so that the next run needs no extra flags.

Nothing is computed but what a reader computes (MoE-LoRA's gate logits, in float64): tensors
keep their stored dtype, bit for bit. What a trainer knew and the user gave (alpha,
temperature, task names, base) is written in. Untrained copies of base tensors are left
out: the base's SHA-256 takes over their purpose.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    check_label_counts,
)
from mtl_export.checkpoint.formats.own_folder import store_checkpoint


def with_base(checkpoint: Checkpoint, base: BaseReference, model_class: str) -> Checkpoint:
    """Return ``checkpoint`` saying that it was trained on ``base``, as ``model_class``.

    Args:
        checkpoint: Whatever a reader returned.
        base: The base it is known to fit; its name counts only where the checkpoint has none.
        model_class: transformers class, as the base decides it.
    """
    return dataclasses.replace(
        checkpoint,
        base=BaseReference(checkpoint.base.id or base.id, base.sha256),
        model_class=model_class,
        members=tuple(with_base(member, base, model_class) for member in checkpoint.members),
    )


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to the folder ``path``.

    Raises:
        CheckpointError: A task name is not usable, a number is not finite, or a task has other
            labels than rows.
    """
    check_label_counts(checkpoint)
    store_checkpoint(path, checkpoint)
