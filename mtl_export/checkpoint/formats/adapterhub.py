"""AdapterHub ``adapters`` 1.x checkpoints, read without that library.

MTL-LoRA there is one adapter per task whose A and B ``share_parameters`` ties; the files do
not record the tie, every task has a full copy. Copies that are equal bit for bit become
one checkpoint of T tasks; unequal ones, and all other methods, become one member per task.

Which task has which id is recorded by ``save_adapter_setup`` alone.

Layouts: ``adapterhub_stored``; methods: ``adapterhub_layers``; heads: ``adapterhub_heads``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    HeadTensors,
    LayerTensors,
    LedgerEntry,
    Readout,
    Task,
    check_task_names,
)
from mtl_export.checkpoint.formats.adapterhub_files import (
    SETUP_FILE,
    StoredAdapter,
    is_adapterhub,
    stored_adapters,
)
from mtl_export.checkpoint.formats.adapterhub_heads import TaskHead, joined_heads, read_head
from mtl_export.checkpoint.formats.adapterhub_layers import (
    MTL_LORA,
    AdapterLayers,
    read_layers,
    stack,
    tied_copy,
)
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import CheckpointError, shortened

FORMAT = "adapterhub"
DESCRIPTION = "AdapterHub's adapters library, 1.x"
LOOKS_FOR = (
    f'a folder with {SETUP_FILE}, with adapters whose adapter_config.json has a "model_class",'
    ' or with a config.json that lists "adapters"'
)
# Every adapted model refers to its word embeddings a second time, prompts or not.
EMBEDDINGS_ALIAS = "prompt_tuning.base_model_embeddings.weight"
SHARED = ("down", "up")
PER_TASK = ("lambda", "mixing")

__all__ = ["DESCRIPTION", "FORMAT", "LOOKS_FOR", "is_adapterhub", "read_adapterhub"]


@dataclass(frozen=True)
class _TaskAdapter:
    """One task: what lies on disk, and what it means."""

    stored: StoredAdapter
    adapter: AdapterLayers
    head: TaskHead

    def layers(self) -> dict[str, LayerTensors]:
        """Return the layers under the model class's names."""
        return {
            (name := _named(module, self.head)): replace(layer, module=name)
            for module, layer in self.adapter.layers.items()
        }


def read_adapterhub(path: Path, order: Sequence[str] | None = None) -> Checkpoint:
    """Return the checkpoint in the folder ``path``; A and B of every task are compared.

    Args:
        path: A folder that ``is_adapterhub``.
        order: The tasks in id order, where the folder does not hold it.

    Raises:
        CheckpointError: The order is lost, or a file is missing, broken or contradicts another.
        AdapterError: A method or head is not supported, with the reason.
        UsageError: ``order`` is not an order of the adapters found.
    """
    stored = stored_adapters(path, order)
    check_task_names(str(path), [entry.task for entry in stored])
    _refuse_different_models(path, stored)
    _refuse_leftovers(path, stored[0])
    heads = joined_heads(list(stored), [read_head(entry) for entry in stored])
    tasks = [
        _TaskAdapter(entry, read_layers(entry), head)
        for entry, head in zip(stored, heads, strict=True)
    ]
    files = {file: None for task in tasks for file in task.stored.files}
    setup = [path / SETUP_FILE] if (path / SETUP_FILE).is_file() else []
    whole = Checkpoint(
        path=path,
        format=FORMAT,
        family=tasks[0].adapter.family,
        tasks=tuple(
            Task(task.stored.task, index, task.head.labels, task.head.kind, _output(task.head))
            for index, task in enumerate(tasks)
        ),
        layers=MappingProxyType({}),
        heads=MappingProxyType({}),
        base=BaseReference(id=stored[0].facts["model_name"]),
        model_class=heads[0].model_class,
        sha256=sha256_of_files([*setup, *files]),
        base_copies=_base_copies(tasks[0]),
        readouts=_readouts(tasks),
        ledger=_ledger(tasks, is_shared=_is_shared(tasks)),
    )
    if len(tasks) > 1 and not _is_shared(tasks):
        members = tuple(
            _filled(replace(whole, tasks=(replace(whole.tasks[i], index=0),)), [task])
            for i, task in enumerate(tasks)
        )
        return replace(whole, members=members)
    return _filled(whole, tasks)


def _filled(checkpoint: Checkpoint, tasks: Sequence[_TaskAdapter]) -> Checkpoint:
    """Return ``checkpoint`` with the tensors of ``tasks``, which share all but their own."""
    modules = dict.fromkeys(module for task in tasks for module in task.head.heads)
    heads: dict[str, tuple[HeadTensors | None, ...]] = {
        module: tuple(task.head.heads.get(module) for task in tasks) for module in modules
    }
    return replace(
        checkpoint,
        readouts=_readouts(tasks),
        family=tasks[0].adapter.family,
        layers=MappingProxyType(_layers(tasks)),
        heads=MappingProxyType(heads),
        replaced=_language_head(checkpoint, tasks),
    )


def _readouts(tasks: Sequence[_TaskAdapter]) -> tuple[Readout, ...]:
    return tuple(dict.fromkeys(task.head.readout for task in tasks if task.head.readout))


def _output(head: TaskHead) -> str:
    return head.readout.name if head.readout else ""


def _layers(tasks: Sequence[_TaskAdapter]) -> dict[str, LayerTensors]:
    """Return the layers of all ``tasks``, with a task axis where the family has one."""
    first, *_ = by_task = [task.layers() for task in tasks]
    if tasks[0].adapter.family != MTL_LORA.family:
        return first
    return {
        module: replace(
            layer,
            tensors={
                **{role: layer.tensors[role] for role in SHARED},
                **{
                    role: stack(
                        f"{module} {role} of {', '.join(task.stored.task for task in tasks)}",
                        [layers[module].tensors[role] for layers in by_task],
                    )
                    for role in PER_TASK
                },
            },
        )
        for module, layer in first.items()
    }


def _is_shared(tasks: Sequence[_TaskAdapter]) -> bool:
    """Return whether A and B, and all numbers beside them, are the same for all tasks."""
    if any(task.adapter.family != MTL_LORA.family for task in tasks):
        return False
    first, *others = [task.adapter.layers for task in tasks]
    for other in others:
        if first.keys() != other.keys():
            return False
        for module, layer in first.items():
            if dict(layer.hyper) != dict(other[module].hyper):
                return False
            if not all(_equal(layer.tensors[r], other[module].tensors[r]) for r in SHARED):
                return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.numpy().tobytes() == other.numpy().tobytes()


def _language_head(checkpoint: Checkpoint, tasks: Sequence[_TaskAdapter]) -> Mapping[str, Tensor]:
    """Return a language model's own head, of which every task saved a copy.

    Raises:
        CheckpointError: The copies differ.
    """
    first, *others = [task.head.replaced for task in tasks]
    for task, other in zip(tasks[1:], others, strict=True):
        if first.keys() != other.keys() or not all(_equal(first[k], other[k]) for k in first):
            raise CheckpointError(
                f"{checkpoint.path}: the language-model heads of {tasks[0].stored.task} and "
                f"{task.stored.task} differ",
                expected=(
                    f"one head for all tasks, as {checkpoint.model_class} has, because every task "
                    "saves a copy of the same module"
                ),
                fix="Export these tasks separately: point --checkpoint at one task's folder",
            )
    return first


def _base_copies(task: _TaskAdapter) -> Mapping[str, Tensor]:
    """Return the base's own tensors that a whole model carries, by the class's names."""
    copies = {
        _named(key, task.head): tensor
        for key, tensor in task.stored.rest.items()
        if ".shared_parameters." not in key and not key.endswith(EMBEDDINGS_ALIAS)
    }
    return MappingProxyType(copies)


def _named(name: str, head: TaskHead) -> str:
    """Return a stored name as ``head.model_class`` has it."""
    return name.partition(".")[2] if head.strips_base else name


def _ledger(tasks: Sequence[_TaskAdapter], *, is_shared: bool) -> tuple[LedgerEntry, ...]:
    """Return one entry for each stored tensor; a whole model's tensors are seen once."""
    entries: dict[str, LedgerEntry] = {}
    for index, task in enumerate(tasks):
        for entry in (*task.adapter.ledger, *task.head.ledger):
            if is_shared and index and entry.fate == "folded":
                first = tasks[0].stored.task
                entry = LedgerEntry(entry.tensor, "known-dead", f"equal to {first}'s, bit for bit")
            known = entries.get(entry.tensor)
            if known is None or known.fate == "known-dead":
                entries[entry.tensor] = entry
    for key in tasks[0].stored.rest:
        if ".shared_parameters." in key:
            entries[key] = tied_copy(key)
        elif key.endswith(EMBEDDINGS_ALIAS):
            entries[key] = LedgerEntry(key, "known-dead", "the word embeddings, stored twice")
        else:
            entries[key] = LedgerEntry(key, "known-dead", "the base's own; --base must hold it")
    return tuple(entries.values())


def _refuse_different_models(path: Path, stored: Sequence[StoredAdapter]) -> None:
    different = {(entry.model_class, entry.facts["model_type"]) for entry in stored}
    if len(different) > 1:
        raise CheckpointError(
            f"{path}: {shortened(f'{entry.task} of {entry.model_class}' for entry in stored)}",
            expected="adapters of one model class, because all tasks are served by one base",
            fix="Export the adapters of each model class separately",
        )


def _refuse_leftovers(path: Path, stored: StoredAdapter) -> None:
    left = [key for key in stored.rest if ".loras." in key or ".adapters." in key]
    if left:
        raise CheckpointError(
            f"{path}: tensors of adapters that config.json does not list: {shortened(left)}",
            expected=(
                "no adapter but the tasks', because a tensor that is ignored would change the "
                "model silently"
            ),
            fix="Delete these adapters and save the model again",
        )
