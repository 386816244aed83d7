"""The form every family is brought to: shared factors and one small core per task.

    W_t = diag(gain_t) . (W + up . core_t . down)        y = x . W_t^T + b_t

T tasks, O outputs, I inputs, U columns of ``up``, D rows of ``down``.
All scalings (alpha / r, learnt scales, softmax mixing weights) are inside
``core``, in float64; ``up`` and ``down`` hold the trained numbers untouched.
Nothing here knows a paper, a file format or a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError, shortened

# Where heads of different widths share one output: the logit of a label that a task does
# not have. Never the argmax, zero after a softmax, and unmistakable when printed.
NO_LABEL = float("-inf")


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """The adapter of one linear layer, for all tasks.

    Attributes:
        module: Dotted name of the layer.
        down: ``[D, I]``, float32 (float64 if stored so), shared by all tasks.
        core: ``[T, U, D]``, float64.
        up: ``[O, U]``, float32 (float64 if stored so), shared by all tasks.
    """

    module: str
    down: Array
    core: Array
    up: Array

    def __post_init__(self) -> None:
        """Check that the three factors fit together."""
        shapes = (self.down.ndim, self.core.ndim, self.up.ndim)
        if shapes != (2, 3, 2) or self.core.shape[1:] != (self.up.shape[1], self.down.shape[0]):
            raise AdapterError(
                where=self.module,
                found=f"up {self.up.shape}, core {self.core.shape}, down {self.down.shape}",
                expected="up [O, U], core [T, U, D], down [D, I]",
                why="the delta of task t is up @ core[t] @ down",
                fix="This is a reader's fault; please report it with the checkpoint's key list",
            )

    @property
    def task_count(self) -> int:
        """Return T."""
        return int(self.core.shape[0])

    @property
    def in_features(self) -> int:
        """Return I."""
        return int(self.down.shape[1])

    @property
    def out_features(self) -> int:
        """Return O."""
        return int(self.up.shape[0])

    def delta(self, task_index: int) -> Array:
        """Return ``up @ core[t] @ down``: float64 ``[O, I]``."""
        up = self.up.astype(np.float64)
        delta: Array = (up @ self.core[task_index]) @ self.down.astype(np.float64)
        return delta


@dataclass(frozen=True, slots=True)
class Head:
    """One task's linear head: ``y = x . weight^T + bias``.

    Attributes:
        weight: ``[L, I]``, float32 or float64; L is the task's label count.
        bias: ``[L]``, same dtype; zeros if the checkpoint had none.
    """

    weight: Array
    bias: Array


@dataclass(frozen=True)
class AdapterSet:
    """A whole checkpoint in normal form.

    Attributes:
        family: Name of the paper's family.
        tasks: In id order.
        layers: By module.
        heads: By module, one per task in id order.
        model_class: transformers class whose module names are used.
        checkpoint_sha256: The checkpoint it came from.
    """

    family: str
    tasks: tuple[Task, ...]
    layers: Mapping[str, LayerAdapter]
    heads: Mapping[str, tuple[Head, ...]]
    model_class: str
    checkpoint_sha256: str

    def __post_init__(self) -> None:
        """Check that every layer and head serves every task."""
        wrong = [
            f"{name}: {layer.task_count} tasks"
            for name, layer in self.layers.items()
            if layer.task_count != len(self.tasks)
        ]
        wrong += [
            f"{name}: {len(heads)} heads"
            for name, heads in self.heads.items()
            if len(heads) != len(self.tasks)
        ]
        if wrong:
            raise CheckpointError(
                where="adapter",
                found=shortened(wrong),
                expected=f"{len(self.tasks)} tasks everywhere",
                why=f"the tasks are {shortened(task.name for task in self.tasks)}",
                fix="Pass the right number of names to --tasks",
            )
