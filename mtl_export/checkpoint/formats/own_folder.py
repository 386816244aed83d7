"""Our own checkpoint folder: any family, and one adapter per task. Read and write.

``adapter_config.json``, UTF-8 JSON, one object with exactly these keys

    format            "mtl-export"
    format_version    2
    adapter_type      name of the family in ``adapters.family.FAMILIES``
    tasks             list in id order of {"name": str, "labels": [str], "kind": K}, K one of
                      single_label_classification, multi_label_classification, regression,
                      headless; labels in logit order, [] for headless
    model_class       transformers class, "" if unknown
    base_model_name_or_path   what --base was during training, "" if unknown
    base_sha256       SHA-256 of the base's weight files (hashing.sha256_of_files), "" if unknown
    readout           null, or {"pooling": P, "activations": [str]}: the heads are the chain
                      head.0, head.1, ... (``checkpoint.Readout``)
    outputs           only where tasks' heads differ in what they compute: list of {"name": str,
                      "pooling": P, "activations": [str], "is_bare": bool}, and each task has
                      {"output": name} beside its other keys; the heads are head.NAME.0, ...,
                      those of tasks with that output only, and none where it is bare
    layers            object: module -> {"roles": sorted [str], "hyper": {str: number},
                      "embedding": bool}; roles and numbers are the family's
    head_modules      sorted list of the dotted names of per-task linear heads
    replaced          sorted list of the base tensors that trained ones take the place of
    rows              object: base tensor -> list of the rows that were trained anew
    members           true where every task has an adapter of its own: task NAME is then a
                      folder ``members/NAME`` of this format with that one task; layers,
                      head_modules, replaced and rows are empty here, and no weights are here

``adapter_model.safetensors``, beside it unless ``members``: per layer M, role R, task id T
(0, 1, ...), head H and base tensor N

    layers.M.R            shape as the family documents
    heads.T.H.weight      [L, I]
    heads.T.H.bias        [L], optional
    replaced.N            as in the base
    rows.N                [number of rows, ...]

All but ``replaced`` are F64, F32, F16 or BF16. Nothing else may be in either file. JSON
objects are sorted by key and tensors by name, so one checkpoint is one sequence of bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    Fate,
    HeadTensors,
    LayerTensors,
    LedgerEntry,
    Readout,
    RowTensors,
    Task,
    check_task_names,
)
from mtl_export.checkpoint.files.json_file import json_or_none
from mtl_export.checkpoint.files.safetensors import open_safetensors, write_safetensors
from mtl_export.checkpoint.formats.own_folder_checks import (
    CONFIG_FILE,
    FORMAT,
    VERSION,
    WEIGHTS_FILE,
    check_tensors,
    checked_config,
    no_file,
    refuse_not_finite,
)
from mtl_export.checkpoint.hashing import sha256_of_digests, sha256_of_file, sha256_of_files
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError, shortened

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "WEIGHTS_FILE",
    "is_own_folder",
    "read_folder",
    "store_checkpoint",
    "write_folder",
]

MEMBERS = "members"
# Roles that hold one slice per task; the others are shared factors.
STACKED_ROLES = frozenset({"lambda", "mixing", "gate", "task_embedding"})


def is_own_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder that says it is in our format."""
    return json_or_none(path / CONFIG_FILE, {"format": {FORMAT}}) is not None


def read_folder(path: Path) -> Checkpoint:
    """Return the checkpoint in our folder ``path``; tensors stay on disk.

    Raises:
        CheckpointError: The config lacks a key or has a wrong one, a file is missing or
            truncated, or holds more or fewer tensors than the config says.
    """
    config = checked_config(path / CONFIG_FILE)
    tasks = tuple(
        Task.from_entry({**entry, "index": index}) for index, entry in enumerate(config["tasks"])
    )
    common: dict[str, Any] = {
        "path": path,
        "format": FORMAT,
        "family": config["adapter_type"],
        "tasks": tasks,
        "base": BaseReference(config["base_model_name_or_path"], config["base_sha256"]),
        "model_class": config["model_class"],
        "readouts": _readouts(config),
    }
    if config["members"]:
        return _with_members(path, common)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise no_file(path, WEIGHTS_FILE)
    tensors = dict(open_safetensors(weights).tensors)
    check_tensors(weights, config, tensors)
    return Checkpoint(
        **common,
        layers=MappingProxyType(
            {module: _layer(module, entry, tensors) for module, entry in config["layers"].items()}
        ),
        heads=MappingProxyType(
            {
                module: tuple(_head(tensors, f"heads.{task.index}.{module}") for task in tasks)
                for module in config["head_modules"]
            }
        ),
        sha256=sha256_of_files([path / CONFIG_FILE, weights]),
        replaced=MappingProxyType(
            {name: tensors[f"replaced.{name}"] for name in config["replaced"]}
        ),
        rows=MappingProxyType(
            {
                name: RowTensors(tuple(indices), tensors[f"rows.{name}"])
                for name, indices in config["rows"].items()
            }
        ),
        ledger=_ledger(config, tensors),
    )


def store_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to the folder ``path``, stored dtypes kept bit for bit.

    Raises:
        CheckpointError: The task names are not usable, or a number is not finite.
    """
    check_task_names(str(path), [task.name for task in checkpoint.tasks])
    config = _config_of(checkpoint)
    refuse_not_finite(checkpoint)
    path.mkdir(parents=True, exist_ok=True)
    for task, member in zip(checkpoint.tasks, checkpoint.members, strict=bool(checkpoint.members)):
        own = (dataclasses.replace(task, index=0),)
        store_checkpoint(path / MEMBERS / task.name, dataclasses.replace(member, tasks=own))
    if not checkpoint.members:
        # Not ascontiguousarray: it turns a scalar into shape [1].
        arrays = {
            name: np.asarray(tensor.numpy(), order="C")
            for name, tensor in sorted(_stored_tensors(checkpoint).items())
        }
        write_safetensors(path / f"{WEIGHTS_FILE}.partial", arrays)
        os.replace(path / f"{WEIGHTS_FILE}.partial", path / WEIGHTS_FILE)
    partial_config = path / f"{CONFIG_FILE}.partial"
    partial_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial_config, path / CONFIG_FILE)


def write_folder(
    path: Path,
    *,
    tasks: tuple[Task, ...],
    layers: Mapping[str, Mapping[str, Array]],
    heads: Mapping[str, Mapping[str, tuple[Array, Array | None]]],
    alpha: float | None,
    temperature: float | None,
    model_class: str,
    base: BaseReference,
) -> None:
    """Write an MTL-LoRA checkpoint that ``read_folder`` reads back unchanged.

    Args:
        path: Folder to create; both files are written beside their names and renamed.
        tasks: In id order.
        layers: By module, then by role (``down``, ``lambda``, ``up``, ``mixing``, ``scaler``).
        heads: By head module, then by task name: weight ``[L, I]`` and bias ``[L]`` or None.
        alpha: s = alpha / r; None leaves it to be asked for.
        temperature: Softmax temperature tau, likewise.
        model_class: transformers class whose module names are used.
        base: The base it was trained on.

    Raises:
        CheckpointError: The task names are not usable, a number is not finite, a head is of no
            task, or an array's dtype cannot be stored.
    """
    names = [task.name for task in tasks]
    check_task_names(str(path), names)
    unknown = sorted({name for by_task in heads.values() for name in by_task} - {*names})
    if unknown:
        raise CheckpointError(
            f"{path}: heads of {shortened(unknown)}",
            expected=f"heads of the tasks {shortened(names)}",
            fix="Name them in tasks, or leave their heads out",
        )
    numbers = {"alpha": alpha, "temperature": temperature}
    hyper = {name: float(value) for name, value in numbers.items() if value is not None}
    checkpoint = Checkpoint(
        path=path,
        format=FORMAT,
        family="mtl_lora",
        tasks=tasks,
        layers={
            module: LayerTensors(
                module, {role: _in_memory(role, value) for role, value in roles.items()}, hyper
            )
            for module, roles in layers.items()
        },
        heads={
            module: tuple(_head_of(by_task.get(task.name)) for task in tasks)
            for module, by_task in heads.items()
        },
        base=base,
        model_class=model_class,
        sha256="",
    )
    store_checkpoint(path, checkpoint)


def _in_memory(name: str, value: Array) -> Tensor:
    dtype = next((key for key, known in NUMPY_DTYPES.items() if known == value.dtype), "")
    if not dtype:
        raise CheckpointError(
            f"{name}: {value.dtype}",
            expected=f"one of {', '.join(NUMPY_DTYPES)}",
            fix="Convert it, for instance with .astype(numpy.float32)",
        )
    return Tensor(name, dtype, value.shape, lambda: value)


def _head_of(stored: tuple[Array, Array | None] | None) -> HeadTensors | None:
    if stored is None:
        return None
    weight, bias = (None if one is None else _in_memory("a head", one) for one in stored)
    return None if weight is None else HeadTensors(weight, bias)


def _task_entry(task: Task) -> dict[str, Any]:
    """Return ``task`` as an item of ``tasks`` in a config."""
    entry = {"name": task.name, "labels": list(task.labels), "kind": task.kind}
    return entry | ({"output": task.output} if task.output else {})


def _fate_of(role: str) -> Fate:
    """Return what becomes of a layer's tensor of this role."""
    return "stacked" if role in STACKED_ROLES or role.startswith("task_") else "folded"


def _readouts(config: Mapping[str, Any]) -> tuple[Readout, ...]:
    one = config["readout"]
    if one is not None:
        return (Readout(one["pooling"], tuple(one["activations"])),)
    return tuple(
        Readout(entry["pooling"], tuple(entry["activations"]), entry["name"], entry["is_bare"])
        for entry in config.get("outputs", ())
    )


def _head(tensors: Mapping[str, Tensor], name: str) -> HeadTensors | None:
    """Return a head; which tasks lack which was checked with the tensors' names."""
    weight = tensors.get(f"{name}.weight")
    return None if weight is None else HeadTensors(weight, tensors.get(f"{name}.bias"))


def _layer(module: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerTensors:
    return LayerTensors(
        module,
        MappingProxyType({role: tensors[f"layers.{module}.{role}"] for role in entry["roles"]}),
        MappingProxyType({name: float(value) for name, value in entry["hyper"].items()}),
        embedding=entry["embedding"],
    )


def _with_members(path: Path, common: dict[str, Any]) -> Checkpoint:
    members = []
    for task in common["tasks"]:
        folder = path / MEMBERS / task.name
        if not (folder / CONFIG_FILE).is_file():
            raise no_file(path, f"{MEMBERS}/{task.name}/{CONFIG_FILE}")
        member = read_folder(folder)
        if len(member.tasks) != 1 or member.members or member.tasks[0].name != task.name:
            raise CheckpointError(
                f"{folder}: tasks {shortened(task.name for task in member.tasks)}",
                expected=f"the one task {task.name}, because {path / CONFIG_FILE} says so",
                fix="Copy the whole folder",
            )
        members.append(member)
    digests = {CONFIG_FILE: sha256_of_file(path / CONFIG_FILE)}
    digests |= {f"{MEMBERS}/{m.tasks[0].name}": m.sha256 for m in members}
    return Checkpoint(
        **common,
        layers=MappingProxyType({}),
        heads=MappingProxyType({}),
        sha256=sha256_of_digests(digests),
        members=tuple(members),
        ledger=tuple(
            LedgerEntry(f"{MEMBERS}/{m.tasks[0].name}/{entry.tensor}", entry.fate, entry.reason)
            for m in members
            for entry in m.ledger
        ),
    )


def _stored_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return every tensor by its key in the weights file."""
    stored = {
        f"layers.{module}.{role}": tensor
        for module, layer in checkpoint.layers.items()
        for role, tensor in layer.tensors.items()
    }
    for module, heads in checkpoint.heads.items():
        for index, head in enumerate(heads):
            if head is None:
                continue
            stored[f"heads.{index}.{module}.weight"] = head.weight
            if head.bias is not None:
                stored[f"heads.{index}.{module}.bias"] = head.bias
    stored |= {f"replaced.{name}": tensor for name, tensor in checkpoint.replaced.items()}
    return stored | {f"rows.{name}": rows.values for name, rows in checkpoint.rows.items()}


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    entries = [
        {"pooling": one.pooling, "activations": list(one.activations)}
        for one in checkpoint.readouts
    ]
    is_one = [one.name for one in checkpoint.readouts] == [""]
    outputs = [
        {"name": one.name, **entry, "is_bare": one.is_bare}
        for one, entry in zip(checkpoint.readouts, entries, strict=True)
    ]
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "adapter_type": checkpoint.family,
        "tasks": [_task_entry(task) for task in checkpoint.tasks],
        "model_class": checkpoint.model_class,
        "base_model_name_or_path": checkpoint.base.id,
        "base_sha256": checkpoint.base.sha256,
        "readout": entries[0] if is_one else None,
        **({"outputs": outputs} if outputs and not is_one else {}),
        "layers": {
            module: {
                "roles": sorted(layer.tensors),
                "hyper": dict(sorted(layer.hyper.items())),
                "embedding": layer.embedding,
            }
            for module, layer in sorted(checkpoint.layers.items())
        },
        "head_modules": sorted(checkpoint.heads),
        "replaced": sorted(checkpoint.replaced),
        "rows": {name: list(rows.indices) for name, rows in sorted(checkpoint.rows.items())},
        "members": bool(checkpoint.members),
    }


def _ledger(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LedgerEntry, ...]:
    entries = {
        f"layers.{module}.{role}": _fate_of(role)
        for module, entry in config["layers"].items()
        for role in entry["roles"]
    }
    return tuple(
        LedgerEntry(name, entries.get(name, "head" if name.startswith("heads.") else "copied"))
        for name in tensors
    )
