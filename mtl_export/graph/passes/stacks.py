"""Stack what tasks own, ready to be gathered by id: T slices and one of NaN.

T tasks, D and U ranks, R the widest rank of any task, I inputs, O outputs, L labels.
Slice T is NaN in every stack: an id outside [0, T) is sent there and can never look
like an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl_export.adapters.normal_form import (
    NO_LABEL,
    AdapterSet,
    AnyAdapter,
    Head,
    LayerAdapter,
    OwnAdapter,
    Rows,
)
from mtl_export.checkpoint.tensors import Array


def with_poison(rows: Array) -> Array:
    """Return ``[T, ...]`` with a slice of NaN appended."""
    poison = np.full((1, *rows.shape[1:]), np.nan)
    stack: Array = np.concatenate([rows, poison])
    return stack


def stacked_cores(layer: LayerAdapter) -> dict[str, Array]:
    """Return down ``[I, D]``, core ``[T + 1, D, U]`` and up ``[U, O]``, for row vectors."""
    return {
        "down": layer.down.T,
        "core": with_poison(layer.core.transpose(0, 2, 1)),
        "up": layer.up.T,
    }


def stacked_blocks(layer: OwnAdapter) -> dict[str, Array]:
    """Return downs ``[T + 1, I, R]`` and ups ``[T + 1, R, O]``, the core inside ups.

    Tasks of smaller rank are padded with zeros; a task without a block has only zeros.
    """
    rank = max(block.down.shape[0] for block in layer.blocks if block is not None)
    downs = np.zeros((layer.task_count, layer.in_features, rank))
    ups = np.zeros((layer.task_count, rank, layer.out_features))
    for index, block in enumerate(layer.blocks):
        if block is not None:
            own = block.down.shape[0]
            downs[index, :, :own] = block.down.T
            ups[index, :own] = (block.up.astype(np.float64) @ block.core).T
    return {"downs": with_poison(downs), "ups": with_poison(ups)}


def embedding_blocks(layer: AnyAdapter) -> dict[str, Array]:
    """Return downs ``[(T + 1) V, R]`` and ups ``[T + 1, R, O]`` of an embedding of V entries."""
    blocks = tuple(layer.factors(index) for index in range(layer.task_count))
    own = OwnAdapter(layer.module, layer.in_features, layer.out_features, blocks)
    stacks = stacked_blocks(own)
    downs = stacks["downs"]
    return {"downs": downs.reshape(-1, downs.shape[-1]), "ups": stacks["ups"]}


def embedding_table(
    base: Array, whole: Sequence[Array | None], rows: Sequence[Rows | None]
) -> tuple[Array, Array]:
    """Return a table of all tasks' vectors, and where in it each task's tokens are.

    Args:
        base: ``[V, O]``.
        whole: Each task's own embedding ``[V, O]``, or None.
        rows: Each task's own rows, or None.

    Returns:
        Table ``[N, O]``: the base's, what tasks have of their own, and a last row of NaN.
        Slots, int64 ``[(T + 1) V]``: task t finds token v in row ``slots[t V + v]``.
    """
    parts, slots = [base], []
    used = len(base)
    for own, new in zip(whole, rows, strict=True):
        mine = np.arange(len(base), dtype=np.int64)
        if own is not None:
            parts.append(own)
            mine += used
            used += len(own)
        elif new is not None:
            parts.append(new.values)
            mine[new.indices] = np.arange(used, used + len(new.values))
            used += len(new.values)
        slots.append(mine)
    slots.append(np.full(len(base), used, np.int64))
    return with_poison(np.concatenate(parts)), np.concatenate(slots)


def absences(adapters: AdapterSet, module: str) -> Array:
    """Return ``[T, 1]``, to be added to one of ``bare_outputs``: 0 where it is the answer."""
    own = [adapters.has_output(task, module) for task in adapters.tasks]
    return np.where(own, 0.0, NO_LABEL)[:, None]


def stacked_heads(heads: tuple[Head, ...]) -> tuple[Array, Array]:
    """Return weights ``[T + 1, I, L]`` and biases ``[T + 1, L]``.

    L is the widest head; a column that a task does not have has weight 0 and bias -inf.
    """
    features = heads[0].weight.shape[1]
    width = max(head.weight.shape[0] for head in heads)
    weights = np.zeros((len(heads), features, width))
    biases = np.full((len(heads), width), NO_LABEL)
    for index, head in enumerate(heads):
        labels = head.weight.shape[0]
        weights[index, :, :labels] = head.weight.T
        biases[index, :labels] = head.bias
    return with_poison(weights), with_poison(biases)
