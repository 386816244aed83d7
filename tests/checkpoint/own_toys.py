"""Checkpoints in memory with one of everything our folder can hold, and how to compare two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    HeadTensors,
    LayerTensors,
    Readout,
    RowTensors,
    Task,
)
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Tensor
from tests.adapters import toys

TASKS = (
    Task("tone", 0, ("bad", "good"), "single_label_classification"),
    Task("tone.fine", 1, ("stars",), "regression"),
)


class Source:
    """Seeded tensors of any dtype, integers included."""

    def __init__(self, seed: int, dtype: str = "F32") -> None:
        self._generator = np.random.default_rng(seed)
        self._dtype = dtype

    def __call__(self, *shape: int, dtype: str = "") -> Tensor:
        """Return a tensor of this shape, in memory."""
        values = self._generator.normal(size=shape) * 9
        array = np.asarray(values).astype(NUMPY_DTYPES[dtype or self._dtype])
        return toys.memory_tensor("in memory", array)


def checkpoint_of(
    seed: int = 0,
    *,
    dtype: str = "F32",
    family: str = "lora",
    tasks: tuple[Task, ...] = TASKS,
    rank: int = 3,
) -> Checkpoint:
    """Return a checkpoint with one of everything a folder can hold."""
    draw = Source(seed, dtype)
    return Checkpoint(
        path=Path("memory"),
        format="test",
        family=family,
        tasks=tasks,
        layers=MappingProxyType(
            {
                "b.dense": LayerTensors(
                    "b.dense", {"down": draw(rank, 4), "up": draw(5, rank)}, {"alpha": 0.1}
                ),
                "a.words": LayerTensors(
                    "a.words", {"scaler": draw(), "down": draw(1, 4)}, {}, embedding=True
                ),
            }
        ),
        heads=MappingProxyType(
            {
                "head.0": tuple(HeadTensors(draw(6, 4), draw(6)) for _ in tasks),
                "head.1": tuple(HeadTensors(draw(len(t.labels), 6), None) for t in tasks),
            }
        ),
        base=BaseReference("toy/base", "cd" * 32),
        model_class="BertModel",
        sha256="",
        replaced=MappingProxyType({"norm.bias": draw(4), "positions": draw(1, 7, dtype="I64")}),
        rows=MappingProxyType({"a.words.weight": RowTensors((6, 2), draw(2, 4))}),
        readouts=(Readout("first", ("tanh",)),),
    )


def with_members(seed: int = 0) -> Checkpoint:
    """Return a checkpoint of two tasks, each with an adapter of its own rank."""
    members = tuple(
        checkpoint_of(seed + index, tasks=(replace(task, index=0),), rank=index + 1)
        for index, task in enumerate(TASKS)
    )
    empty: Mapping[str, Any] = MappingProxyType({})
    return replace(
        checkpoint_of(seed), layers=empty, heads=empty, replaced=empty, rows=empty, members=members
    )


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """Check that two checkpoints hold the same, bit for bit; path and format aside."""
    for name in ("family", "tasks", "base", "model_class", "readouts"):
        assert getattr(found, name) == getattr(expected, name), name
    assert tensors_of(found) == tensors_of(expected)
    assert {m: (dict(la.hyper), la.embedding) for m, la in found.layers.items()} == {
        m: (dict(la.hyper), la.embedding) for m, la in expected.layers.items()
    }
    assert {n: rows.indices for n, rows in found.rows.items()} == {
        n: rows.indices for n, rows in expected.rows.items()
    }
    assert len(found.members) == len(expected.members)
    for one, other in zip(found.members, expected.members, strict=True):
        assert_same(one, other)


def tensors_of(checkpoint: Checkpoint) -> dict[tuple[str, ...], tuple[str, Any, bytes]]:
    """Return every tensor of ``checkpoint``: dtype, shape and bytes by place."""
    found: dict[tuple[str, ...], Tensor] = {
        ("layer", module, role): tensor
        for module, layer in checkpoint.layers.items()
        for role, tensor in layer.tensors.items()
    }
    for module, heads in checkpoint.heads.items():
        for index, head in enumerate(heads):
            if head is None:
                continue
            found["head", module, str(index), "weight"] = head.weight
            if head.bias is not None:
                found["head", module, str(index), "bias"] = head.bias
    found |= {("replaced", name): tensor for name, tensor in checkpoint.replaced.items()}
    found |= {("rows", name): rows.values for name, rows in checkpoint.rows.items()}
    return {place: (t.dtype, t.shape, t.numpy().tobytes()) for place, t in found.items()}
