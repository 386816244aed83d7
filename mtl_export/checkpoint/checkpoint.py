"""The record every checkpoint format is read into.

A format file (one per producer) knows that producer's tensor names; what it
hands on speaks of modules, roles and tasks only. A family file (one per paper)
turns these roles into the normal form and never sees a foreign name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mtl_export.checkpoint.files.json_file import Shape, parse_json
from mtl_export.errors import CheckpointError, TaskNotFoundError, shortened

if TYPE_CHECKING:  # a service that serves tasks needs Task and no tensor formats
    from mtl_export.checkpoint.formats.mtlora_swin_settings import SwinSettings
    from mtl_export.checkpoint.tensors import Tensor

TaskKind = Literal[
    "single_label_classification", "multi_label_classification", "regression", "headless"
]
TASK_KINDS: tuple[TaskKind, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "headless",
)
# A row of the task table in an ONNX file, and in an engine's manifest.
TASK_ENTRY: Shape = {
    "name": str,
    "index": int,
    "labels": [str],
    "kind": frozenset(TASK_KINDS),
    "output?": str,
}
# A task name becomes a folder and part of a tensor key.
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Task:
    """One task, at its position in the id order.

    Attributes:
        name: Its name, safe as a folder name.
        index: Its id: the value of ``task_ids`` that selects it.
        labels: Its label names in logit order; empty for a headless task.
        kind: The word transformers uses in ``config.problem_type``, or ``headless``
            (the base model's own outputs, as for a language model).
        output: Name of the graph output that has its answer, where tasks have several
            (see ``outputs``); empty where all tasks share the model's outputs.
    """

    name: str
    index: int
    labels: tuple[str, ...] = ()
    kind: TaskKind = "headless"
    output: str = ""

    def as_entry(self) -> dict[str, Any]:
        """Return it as a row of the task table in an ONNX file."""
        entry = {"name": self.name, "index": self.index, "labels": self.labels, "kind": self.kind}
        return entry | ({"output": self.output} if self.output else {})

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Task:
        """Return the task of a row of such a table."""
        labels = tuple(entry["labels"])
        output = entry.get("output") or ""
        return cls(entry["name"], entry["index"], labels, entry["kind"], output)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """What a checkpoint holds for one adapted module.

    Attributes:
        module: Dotted name of the base linear layer, in the model class's names.
        tensors: By role; which roles exist is the family's business.
        hyper: Numbers that are not tensors (``alpha``, ``temperature``), by name.
        embedding: The module is an embedding: a linear layer of one-hot inputs, whose
            weight is stored ``[I, O]``.
    """

    module: str
    tensors: Mapping[str, Tensor]
    hyper: Mapping[str, float]
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """One task's own copy of a head module.

    Attributes:
        weight: ``[L, I]``, L labels.
        bias: ``[L]``, or None.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class RowTensors:
    """Some rows of a base tensor, trained anew (the vectors of added tokens).

    Attributes:
        indices: Which rows, each once.
        values: ``[len(indices), ...]``: what stands there instead.
    """

    indices: tuple[int, ...]
    values: Tensor


Pooling = Literal["first", "last", "pooler", "tokens"]
POOLINGS: tuple[Pooling, ...] = ("first", "last", "pooler", "tokens")


@dataclass(frozen=True, slots=True)
class Readout:
    """How logits are read off a base, where no transformers class computes them so.

    The head is a chain of linear layers ``head.0``, ``head.1``, ...: the modules of
    ``Checkpoint.heads``, in this order, beside a ``model_class`` without a head. Where tasks
    differ in what they read off, each readout has a name and its chain is ``head.NAME.0``, ...

    Attributes:
        pooling: What the chain is applied to: the hidden state of the ``first`` token, of the
            ``last`` one that is not padding, the ``pooler``'s output, or all ``tokens``.
        activations: transformers' name of the function after each linear layer but the last;
            "linear" for none.
        name: Of the output; empty where all tasks have this one.
        is_bare: There is no chain: the hidden states are the answer.
    """

    pooling: Pooling
    activations: tuple[str, ...]
    name: str = ""
    is_bare: bool = False

    @property
    def module(self) -> str:
        """Return the name of the whole."""
        return f"head.{self.name}" if self.name else "head"

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the names of the chain's linear layers."""
        count = 0 if self.is_bare else len(self.activations) + 1
        return tuple(f"{self.module}.{index}" for index in range(count))


def last_modules(readouts: Sequence[Readout]) -> frozenset[str]:
    """Return the linear layers that give logits."""
    return frozenset(one.modules[-1] for one in readouts if one.modules)


def is_of_another_output(module: str, output: str) -> bool:
    """Return whether ``module`` is in the head of an output of another name."""
    return module.startswith("head.") and module.split(".")[1] != output


def bare_modules(readouts: Sequence[Readout]) -> tuple[str, ...]:
    """Return the modules whose input is an answer as it is."""
    return tuple(one.module for one in readouts if one.is_bare)


@dataclass(frozen=True, slots=True)
class BaseReference:
    """What the checkpoint says of the base it was trained on; empty when it says nothing."""

    id: str = ""
    sha256: str = ""


Fate = Literal["folded", "stacked", "head", "copied", "known-dead"]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What becomes of one stored tensor; one without a fate is refused while reading.

    Attributes:
        tensor: Its key in the file.
        fate: ``folded`` into the base weight, ``stacked`` per task, ``head``, ``copied`` in
            place of the base's, or ``known-dead``: no effect on any output.
        reason: Why, where the fate alone does not say.
    """

    tensor: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, understood but not yet computed with.

    Attributes:
        path: What the user pointed at.
        format: Who wrote it, a key of ``reader.FORMATS``.
        family: The paper, a name in ``adapters.family.FAMILIES``.
        tasks: In id order.
        layers: By module.
        heads: By module, then one per task in id order, None for a task that has another of
            ``readouts``; empty for headless tasks.
        base: The base it was trained on, as far as it says.
        model_class: transformers class whose module names are used; empty if unknown.
        sha256: Of the files read (see ``hashing.sha256_of_files``).
        replaced: Trained tensors that take the place of the base's for all tasks, by
            their name in the model class.
        rows: The same where only some rows of a tensor were trained.
        base_copies: Tensors of the base, by name, that the file carries untrained: a check
            on the base, nothing more.
        members: Set when every task brings an adapter of its own: one checkpoint of one
            task each, in id order. all other tensors are then there, none here.
        ledger: What becomes of every stored tensor.
        readouts: How ``heads`` read off ``model_class``: one for all tasks, or several by name
            (``Task.output``); empty where the class has these modules.
        notes: What the user should know of the file, one sentence each, without a full stop.
        swin: Set where the file holds a whole Swin with task streams, to which no base belongs:
            what decides its numbers beside the tensors.
    """

    path: Path
    format: str
    family: str
    tasks: tuple[Task, ...]
    layers: Mapping[str, LayerTensors]
    heads: Mapping[str, tuple[HeadTensors | None, ...]]
    base: BaseReference
    model_class: str
    sha256: str
    replaced: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    rows: Mapping[str, RowTensors] = field(default_factory=lambda: MappingProxyType({}))
    base_copies: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    members: tuple[Checkpoint, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    readouts: tuple[Readout, ...] = ()
    notes: tuple[str, ...] = ()
    swin: SwinSettings | None = None

    def readout_of(self, task: Task) -> Readout | None:
        """Return how ``task``'s answer is read off, None where the class does it."""
        return next((one for one in self.readouts if one.name == task.output), None)

    def renamed(self, modules: Mapping[str, str]) -> Checkpoint:
        """Return the same checkpoint with some modules under other names."""

        def tensors(named: Mapping[str, Any]) -> Mapping[str, Any]:
            split = ((name.rpartition("."), value) for name, value in named.items())
            return MappingProxyType({f"{modules.get(m, m)}.{kind}": v for (m, _, kind), v in split})

        layers = {
            modules.get(name, name): dataclasses.replace(layer, module=modules.get(name, name))
            for name, layer in self.layers.items()
        }
        return dataclasses.replace(
            self,
            layers=MappingProxyType(layers),
            heads=MappingProxyType({modules.get(n, n): heads for n, heads in self.heads.items()}),
            replaced=tensors(self.replaced),
            rows=tensors(self.rows),
            base_copies=tensors(self.base_copies),
            members=tuple(member.renamed(modules) for member in self.members),
        )


def tasks_of(table: str, where: str) -> tuple[Task, ...]:
    """Return the tasks of the task table in an ONNX file; none of an empty one.

    Raises:
        CheckpointError: It is no JSON, or no table of tasks.
    """
    entries = parse_json(table, where, [TASK_ENTRY], fix="Export the graph again")
    if entries:
        check_task_names(where, [entry["name"] for entry in entries])
    return tuple(map(Task.from_entry, entries))


def task_named(
    tasks: tuple[Task, ...], name: str, *, of: str = "checkpoint", option: str = "--task"
) -> Task:
    """Return the task called ``name``.

    Args:
        tasks: Those there are.
        name: Its name.
        of: What has them, for the message.
        option: What was typed before the name, for the message; empty for an argument.

    Raises:
        TaskNotFoundError: There is none; the message names the nearest.
    """
    for task in tasks:
        if task.name == name:
            return task
    raise TaskNotFoundError.from_name(name, (task.name for task in tasks), of=of, option=option)


def check_task_names(where: str, names: list[str]) -> None:
    """Refuse names that are empty, repeated, or unsafe as a folder name.

    Raises:
        CheckpointError: With every bad name.
    """
    bad = [name for name in names if not TASK_NAME.fullmatch(name)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or bad or repeated:
        raise CheckpointError(
            f"{where}: task names {names!r}",
            expected=(
                "at least one, each different, of letters, digits, '_', '-' and '.', because a "
                "task name becomes a folder name"
            ),
            fix="Rename the tasks",
        )


# Where a head has several linear layers, the one that gives the logits (transformers 5.23).
LOGIT_LAYERS = frozenset({"classifier", "score", "out_proj"})


def check_label_counts(checkpoint: Checkpoint) -> None:
    """Refuse tasks whose labels are not as many as the rows of their head.

    Raises:
        CheckpointError: With every such task.
    """
    for member in checkpoint.members:
        check_label_counts(member)
    problems = []
    for index, task in enumerate(checkpoint.tasks if checkpoint.heads else ()):
        readout = checkpoint.readout_of(task)
        modules = list(checkpoint.heads if readout is None else readout.modules[-1:])
        last = [name for name in modules if name.rpartition(".")[2] in LOGIT_LAYERS]
        heads = {name: checkpoint.heads[name][index] for name in last or modules}
        rows = {name: head.weight.shape[0] for name, head in heads.items() if head is not None}
        if task.labels and rows and len(task.labels) not in rows.values():
            problems += [
                f"task {task.name} has {len(task.labels)} labels ({shortened(task.labels)}),"
                f" its head {name} {count} rows"
                for name, count in rows.items()
            ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {shortened(problems)}",
            expected=(
                "a label for every row, because a row's number is the label's: a merged folder "
                "would not load, or say the wrong names"
            ),
            fix="Correct the labels, in the order of the rows, and save the checkpoint again",
        )
