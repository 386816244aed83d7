"""Any checkpoint as our own folder, so that the next run needs no extra flags.

Nothing is computed but what a reader computes (MoE-LoRA's gate logits, in float64): tensors
keep their stored dtype, bit for bit. What a trainer knew and the user gave (alpha,
temperature, task names, base) is written in. Untrained copies of base tensors are left
out: the base's SHA-256 takes over their purpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    LayerTensors,
    check_label_counts,
)
from mtl_export.checkpoint.formats.own_folder import SUFFIXES, write_folder
from mtl_export.checkpoint.formats.own_folder_v2 import write_v2
from mtl_export.checkpoint.tensors import FLOAT_DTYPES

NUMBERS = frozenset({"alpha", "temperature"})
NEEDED = frozenset({"down", "up", "lambda"})


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
    """Write ``checkpoint`` to the folder ``path``, in the oldest version that can hold it.

    Raises:
        CheckpointError: A task name is not usable, a number is not finite, or a task has other
            labels than rows.
    """
    check_label_counts(checkpoint)
    if not fits_version_1(checkpoint):
        write_v2(path, checkpoint)
        return
    first = next(iter(checkpoint.layers.values()))
    write_folder(
        path,
        tasks=checkpoint.tasks,
        layers={
            module: {role: tensor.numpy() for role, tensor in layer.tensors.items()}
            for module, layer in checkpoint.layers.items()
        },
        heads={
            module: {
                task.name: (head.weight.numpy(), None if head.bias is None else head.bias.numpy())
                for task, head in zip(checkpoint.tasks, heads, strict=True)
                if head is not None
            }
            for module, heads in checkpoint.heads.items()
        },
        alpha=first.hyper.get("alpha"),
        temperature=first.hyper.get("temperature"),
        model_class=checkpoint.model_class,
        base=checkpoint.base,
    )


def fits_version_1(checkpoint: Checkpoint) -> bool:
    """Return whether version 1 of our folder can hold ``checkpoint``.

    It has one r, n, T, alpha and temperature for all layers, MTL-LoRA's tensors, and heads
    with one row per label.
    """
    if checkpoint.family != "mtl_lora" or not checkpoint.layers:
        return False
    if checkpoint.members or checkpoint.replaced or checkpoint.rows or checkpoint.readouts:
        return False
    if any(not layer.tensors.keys() >= NEEDED for layer in checkpoint.layers.values()):
        return False
    if len({_numbers(layer) for layer in checkpoint.layers.values()}) != 1:
        return False
    if any(layer.embedding or layer.hyper.keys() - NUMBERS for layer in checkpoint.layers.values()):
        return False
    roles = next(iter(checkpoint.layers.values())).tensors.keys()
    return (
        roles <= SUFFIXES.keys()
        and all(dtype in FLOAT_DTYPES for dtype in _dtypes(checkpoint))
        and all(
            head is not None and head.weight.shape[0] == len(task.labels)
            for heads in checkpoint.heads.values()
            for task, head in zip(checkpoint.tasks, heads, strict=True)
        )
    )


def _numbers(layer: LayerTensors) -> tuple[object, ...]:
    """Return what version 1 says once for all layers."""
    shapes: Mapping[str, tuple[int, ...]] = {r: t.shape for r, t in layer.tensors.items()}
    return (
        *(layer.hyper.get(name) for name in sorted(NUMBERS)),
        *sorted(shapes),
        shapes["down"][0],
        shapes["up"][0],
        shapes["lambda"],
    )


def _dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    for layer in checkpoint.layers.values():
        yield from (tensor.dtype for tensor in layer.tensors.values())
    for heads in checkpoint.heads.values():
        for head in filter(None, heads):
            yield from (tensor.dtype for tensor in (head.weight, head.bias) if tensor is not None)
