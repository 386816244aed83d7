"""The form every family is brought to: shared factors and one small core per task.

    W_t = diag(gain_t) . (W + up . core_t . down)        y = x . W_t^T + b_t

T tasks, O outputs, I inputs, U columns of ``up``, D rows of ``down``.
All scalings (alpha / r, learnt scales, softmax mixing weights) are inside
``core``, in float64; ``up`` and ``down`` hold the trained numbers untouched.
Nothing here knows a paper, a file format or a runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError, shortened

# Where heads of different widths share one output: the logit of a label that a task does
# not have. Never the argmax, zero after a softmax, and unmistakable when printed.
NO_LABEL = float("-inf")


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """The adapter of one linear layer whose factors all tasks share.

    Attributes:
        module: Dotted name of the layer.
        down: ``[D, I]``, float32 (float64 if stored so), shared by all tasks.
        core: ``[T, U, D]``, float64.
        up: ``[O, U]``, float32 (float64 if stored so), shared by all tasks.
        gain: ``[T, O]``, float64, or None where every gain is 1.
        bias: ``[T, O]``, float64: replaces the base's bias; None where it stays.
        transposed: The base stores the weight ``[I, O]``, as Conv1D and embeddings do.
    """

    module: str
    down: Array
    core: Array
    up: Array
    gain: Array | None = None
    bias: Array | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check that the factors fit together."""
        shapes = (self.down.ndim, self.core.ndim, self.up.ndim)
        if shapes != (2, 3, 2) or self.core.shape[1:] != (self.up.shape[1], self.down.shape[0]):
            raise _misfit(self.module, f"up {self.up.shape}, core {self.core.shape}, down"
                          f" {self.down.shape}")  # fmt: skip
        _check_rows(self)

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

    def factors(self, task_index: int) -> Factors:
        """Return the factors of one task."""
        return Factors(self.down, self.core[task_index], self.up)

    def delta(self, task_index: int) -> Array:
        """Return ``up @ core[t] @ down``: float64 ``[O, I]``."""
        return self.factors(task_index).delta()


@dataclass(frozen=True, slots=True)
class Factors:
    """The low-rank factors of one task: ``delta = up @ core @ down``.

    Attributes:
        down: ``[D, I]``, float32 or float64.
        core: ``[U, D]``, float64.
        up: ``[O, U]``, float32 or float64.
    """

    down: Array
    core: Array
    up: Array

    def delta(self) -> Array:
        """Return the product: float64 ``[O, I]``."""
        left = self.up.astype(np.float64) @ self.core
        product: Array = left @ self.down.astype(np.float64)
        return product


@dataclass(frozen=True, slots=True)
class OwnAdapter:
    """The adapter of one linear layer for which every task brings its own factors.

    The shared form would hold these as a block-diagonal core of ``T (T r)^2`` numbers;
    kept as blocks they cost what the checkpoints cost.

    Attributes:
        module: Dotted name of the layer.
        in_features: I.
        out_features: O.
        blocks: One per task in id order; None where a task leaves the layer alone.
        gain: ``[T, O]``, float64, or None where every gain is 1.
        bias: ``[T, O]``, float64: replaces the base's bias; None where it stays.
        transposed: The base stores the weight ``[I, O]``, as Conv1D and embeddings do.
    """

    module: str
    in_features: int
    out_features: int
    blocks: tuple[Factors | None, ...]
    gain: Array | None = None
    bias: Array | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        """Check that the blocks fit together."""
        for block in self.blocks:
            if block is not None and (
                block.down.shape[1] != self.in_features
                or block.up.shape[0] != self.out_features
                or block.core.shape != (block.up.shape[1], block.down.shape[0])
            ):
                raise _misfit(self.module, f"a block with up {block.up.shape}, core"
                              f" {block.core.shape}, down {block.down.shape}")  # fmt: skip
        _check_rows(self)

    @property
    def task_count(self) -> int:
        """Return T."""
        return len(self.blocks)

    def factors(self, task_index: int) -> Factors | None:
        """Return the factors of one task, None if it leaves the layer alone."""
        return self.blocks[task_index]

    def delta(self, task_index: int) -> Array:
        """Return the task's delta: float64 ``[O, I]``."""
        block = self.blocks[task_index]
        if block is None:
            return np.zeros((self.out_features, self.in_features))
        return block.delta()


AnyAdapter = LayerAdapter | OwnAdapter


def _check_rows(layer: AnyAdapter) -> None:
    expected = (layer.task_count, layer.out_features)
    for name, rows in (("gain", layer.gain), ("bias", layer.bias)):
        if rows is not None and rows.shape != expected:
            raise _misfit(layer.module, f"{name} {rows.shape} for [T, O] = {expected}")


def _misfit(module: str, found: str) -> AdapterError:
    return AdapterError(
        f"{module}: {found}",
        expected="up [O, U], core [T, U, D], down [D, I], gain and bias [T, O]",
        fix="This is a reader's fault; please report it with the checkpoint's key list",
    )


@dataclass(frozen=True, slots=True)
class Head:
    """One task's linear head: ``y = x . weight^T + bias``.

    Attributes:
        weight: ``[L, I]``, float32 or float64; L is the task's label count.
        bias: ``[L]``, same dtype; zeros if the checkpoint had none.
    """

    weight: Array
    bias: Array


def filled_heads(heads: Sequence[Head | None], *, is_last: bool) -> tuple[Head, ...]:
    """Return ``heads`` with a head for tasks whose answer is another output.

    Args:
        heads: One per task, None where it has none; not all are None.
        is_last: It gives the logits: the filled-in ones have no label, so their rows are all
            -inf. A head inside a chain has zeros, which the last one ignores.
    """
    known = next(head for head in heads if head is not None)
    labels = 0 if is_last else known.weight.shape[0]
    absent = Head(
        np.zeros((labels, known.weight.shape[1]), known.weight.dtype),
        np.zeros(labels, known.bias.dtype),
    )
    return tuple(absent if head is None else head for head in heads)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a base tensor that one task trained anew.

    Attributes:
        indices: int64 ``[k]``, each once.
        values: ``[k, ...]``, float32 or float64: what stands there instead.
    """

    indices: Array
    values: Array

    def placed_in(self, base: Array) -> Array:
        """Return a copy of ``base``, float32 or float64, with these rows in it."""
        result: Array = base.astype(np.result_type(base.dtype, self.values.dtype))
        result[self.indices] = self.values
        return result


@dataclass(frozen=True)
class AdapterSet:
    """A whole checkpoint in normal form.

    Attributes:
        family: Name of the paper's family.
        tasks: In id order.
        layers: By module.
        heads: By module, one per task in id order; one without labels where a task's answer
            is another output.
        model_class: transformers class whose module names are used.
        checkpoint_sha256: The checkpoint it came from.
        replaced: Tensors of the model class, by name, whose trained values all tasks
            share and which take the place of the base's (biases, norms, embeddings).
        task_replaced: The same, one per task in id order; None where a task keeps the base's.
        rows: Tensors of which tasks trained only some rows, one per task in id order.
        bare_outputs: Modules whose input is the answer of those tasks whose output has their
            name, ``head.NAME``, and of no other.
    """

    family: str
    tasks: tuple[Task, ...]
    layers: Mapping[str, AnyAdapter]
    heads: Mapping[str, tuple[Head, ...]]
    model_class: str
    checkpoint_sha256: str
    replaced: Mapping[str, Array] = field(default_factory=lambda: MappingProxyType({}))
    task_replaced: Mapping[str, tuple[Array | None, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    rows: Mapping[str, tuple[Rows | None, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    bare_outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that every layer and head serves every task."""
        wrong = [
            f"{name}: {layer.task_count} tasks"
            for name, layer in self.outlines.items()
            if layer.task_count != len(self.tasks)
        ]
        wrong += [
            f"{name}: {len(heads)} heads"
            for name, heads in self.heads.items()
            if len(heads) != len(self.tasks)
        ]
        wrong += [
            f"{name}: {len(values)} values"
            for name, values in [*self.task_replaced.items(), *self.rows.items()]
            if len(values) != len(self.tasks)
        ]
        if wrong:
            raise CheckpointError(
                f"adapter: {shortened(wrong)}",
                expected=(
                    f"{len(self.tasks)} tasks everywhere, because the tasks are "
                    f"{shortened(task.name for task in self.tasks)}"
                ),
                fix="Pass the right number of names to --tasks",
            )

    @property
    def own_tensors(self) -> tuple[str, ...]:
        """Return the tensors that some tasks replace, wholly or in part, for themselves."""
        return tuple(dict.fromkeys([*self.task_replaced, *self.rows]))

    def own_rows(self, name: str, task_index: int) -> Rows | None:
        """Return the rows that task t has in place of the base tensor's own."""
        by_task = self.rows.get(name)
        return None if by_task is None else by_task[task_index]

    def has_output(self, task: Task, module: str) -> bool:
        """Return whether one of ``bare_outputs`` is the task's answer."""
        return module == f"head.{task.output}"

    @property
    def outlines(self) -> Mapping[str, AnyAdapter]:
        """Return the layers for whoever needs no values of ``down`` and ``up``: see ``lazy``."""
        found: Mapping[str, AnyAdapter] = getattr(self.layers, "outlines", self.layers)
        return found

    def replacement(self, name: str, task_index: int) -> Array | None:
        """Return what task t has in place of the base tensor ``name``, None if it keeps it.

        Weights of adapted layers are not replaced but merged; see ``merge``.
        """
        module, _, kind = name.rpartition(".")
        layer = self.outlines.get(module)
        if kind == "bias" and layer is not None and layer.bias is not None:
            bias: Array = layer.bias[task_index]
            return bias
        own = self.task_replaced.get(name)
        if own is not None and own[task_index] is not None:
            return own[task_index]
        return self.replaced.get(name)
