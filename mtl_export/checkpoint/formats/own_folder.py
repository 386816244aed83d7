"""Our own checkpoint folder: read it, and write it from a trainer.

There are two versions. Version 1, below, holds an MTL-LoRA adapter whose layers share
their numbers; version 2 (``folder_v2``) holds everything else: other families, numbers per
layer, one adapter per task, trained tensors of the base. Two files, PEFT's habit:

``adapter_config.json``, UTF-8 JSON, one object with exactly these keys

    format            "mtl-export"
    format_version    1
    adapter_type      name of the family: "mtl_lora"
    tasks             list in id order of {"name": str, "labels": [str], "kind": K}, K one of
                      single_label_classification, multi_label_classification, regression,
                      headless; labels in logit order, [] for headless
    r                 rank, int
    lora_alpha        number or null (then --alpha is asked for)
    temperature       softmax temperature tau > 0, number or null (then --temperature)
    up_projections    n, int
    lambda_format     "full" or "diagonal"
    learn_scale       bool
    target_modules    sorted list of the adapted modules' dotted names in model_class
    head_modules      sorted list of the dotted names of per-task linear heads
    model_class       transformers class, e.g. "BertForSequenceClassification"
    base_model_name_or_path   what --base was during training, "" if unknown
    base_sha256       SHA-256 of the base's weight files (hashing.sha256_of_files), "" if unknown

``adapter_model.safetensors``, every tensor F64, F32, F16 or BF16, per target module M

    M.lora_A          [r, I]
    M.lora_lambdas    [T, r, r] (full) or [T, r] (diagonal)
    M.lora_B          [n, O, r]
    M.lora_B_w        [T, n], before the softmax
    M.lora_scaler     [], before the sigmoid; only with learn_scale

and per task NAME and head module H

    heads.NAME.H.weight   [L, I]
    heads.NAME.H.bias     [L], optional

Nothing else may be in either file. A checkpoint is written as version 1 if that can hold
it, so that older readers can read it.
"""

from __future__ import annotations

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
    HeadTensors,
    LayerTensors,
    LedgerEntry,
    Task,
    check_task_names,
)
from mtl_export.checkpoint.files.json_file import Shape, json_or_none, misfit, read_json
from mtl_export.checkpoint.files.safetensors import open_safetensors, write_safetensors
from mtl_export.checkpoint.formats.own_folder_checks import (
    CONFIG_FILE,
    FORMAT,
    VERSION,
    WEIGHTS_FILE,
    is_task_entry,
)
from mtl_export.checkpoint.formats.own_folder_v2 import fate_of, read_v2, task_entry
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError, shortened

__all__ = [
    "CONFIG_FILE",
    "CONFIG_KEYS",
    "FORMAT",
    "SUFFIXES",
    "WEIGHTS_FILE",
    "is_own_folder",
    "read_folder",
    "write_folder",
]

FORMAT_VERSION = 1
# role in the family -> suffix in the file
SUFFIXES = {
    "down": "lora_A",
    "lambda": "lora_lambdas",
    "up": "lora_B",
    "mixing": "lora_B_w",
    "scaler": "lora_scaler",
}
CONFIG_KEYS: dict[str, Shape] = {
    "format": str,
    "format_version": int,
    "adapter_type": str,
    "tasks": [object],
    "r": int,
    "lora_alpha": (float, None),
    "temperature": (float, None),
    "up_projections": int,
    "lambda_format": str,
    "learn_scale": bool,
    "target_modules": [str],
    "head_modules": [str],
    "model_class": str,
    "base_model_name_or_path": str,
    "base_sha256": str,
}


def is_own_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder that says it is in our format."""
    return json_or_none(path / CONFIG_FILE, {"format": {FORMAT}}) is not None


def read_folder(path: Path) -> Checkpoint:
    """Return the checkpoint in our folder ``path``; tensors stay on disk.

    Raises:
        CheckpointError: The config lacks a key or has a wrong one, the weights are
            missing, truncated, or hold more or fewer tensors than the config says.
    """
    if _version(path / CONFIG_FILE) == VERSION:
        return read_v2(path)
    config = _read_config(path / CONFIG_FILE)
    weights_path = path / WEIGHTS_FILE
    if not weights_path.is_file():
        raise CheckpointError(
            f"{path}: no {WEIGHTS_FILE}",
            expected=f"{WEIGHTS_FILE} beside {CONFIG_FILE}",
            fix="Copy the whole folder",
        )
    tensors = open_safetensors(weights_path).tensors
    tasks = tuple(
        Task(entry["name"], index, tuple(entry["labels"]), entry["kind"])
        for index, entry in enumerate(config["tasks"])
    )
    _check_keys(weights_path, config, tensors)
    _check_config_shapes(weights_path, config, tensors)
    hyper = {
        name: float(config[key])
        for name, key in (("alpha", "lora_alpha"), ("temperature", "temperature"))
        if config[key] is not None
    }
    layers = {
        module: LayerTensors(
            module,
            {
                role: tensors[f"{module}.{suffix}"]
                for role, suffix in SUFFIXES.items()
                if f"{module}.{suffix}" in tensors
            },
            MappingProxyType(hyper),
        )
        for module in config["target_modules"]
    }
    heads = {
        module: tuple(
            HeadTensors(
                tensors[f"heads.{task.name}.{module}.weight"],
                tensors.get(f"heads.{task.name}.{module}.bias"),
            )
            for task in tasks
        )
        for module in config["head_modules"]
    }
    return Checkpoint(
        path=path,
        format=FORMAT,
        family=config["adapter_type"],
        tasks=tasks,
        layers=MappingProxyType(layers),
        heads=MappingProxyType(heads),
        base=BaseReference(config["base_model_name_or_path"], config["base_sha256"]),
        model_class=config["model_class"],
        sha256=sha256_of_files([path / CONFIG_FILE, weights_path]),
        ledger=_ledger(config, tensors),
    )


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
        CheckpointError: The task names are not usable.
    """
    check_task_names(str(path), [task.name for task in tasks])
    # Not ascontiguousarray: it turns the scalar lora_scaler into shape [1].
    tensors = {
        f"{module}.{SUFFIXES[role]}": np.asarray(value, order="C")
        for module, roles in layers.items()
        for role, value in roles.items()
    }
    for module, by_task in heads.items():
        for name, (weight, bias) in by_task.items():
            tensors[f"heads.{name}.{module}.weight"] = np.asarray(weight, order="C")
            if bias is not None:
                tensors[f"heads.{name}.{module}.bias"] = np.asarray(bias, order="C")
    first = next(iter(layers.values()))
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "adapter_type": "mtl_lora",
        "tasks": [task_entry(task) for task in tasks],
        "r": int(first["down"].shape[0]),
        "lora_alpha": alpha,
        "temperature": temperature,
        "up_projections": int(first["up"].shape[0]),
        "lambda_format": "full" if first["lambda"].ndim == 3 else "diagonal",
        "learn_scale": "scaler" in first,
        "target_modules": sorted(layers),
        "head_modules": sorted(heads),
        "model_class": model_class,
        "base_model_name_or_path": base.id,
        "base_sha256": base.sha256,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / f"{WEIGHTS_FILE}.partial", dict(sorted(tensors.items())))
    partial_config = path / f"{CONFIG_FILE}.partial"
    partial_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(path / f"{WEIGHTS_FILE}.partial", path / WEIGHTS_FILE)
    os.replace(partial_config, path / CONFIG_FILE)


def _version(config: Path) -> object:
    return read_json(config).get("format_version")


def _ledger(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LedgerEntry, ...]:
    """Return what becomes of every tensor, in file order."""
    fates = {
        f"{module}.{suffix}": fate_of(role)
        for module in config["target_modules"]
        for role, suffix in SUFFIXES.items()
    }
    return tuple(LedgerEntry(name, fates.get(name, "head")) for name in tensors)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    problems = [f"no {key!r}" for key in CONFIG_KEYS if key not in config]
    problems += [f"unknown {key!r}" for key in config if key not in CONFIG_KEYS]
    problems += [
        found[0]
        for key, shape in CONFIG_KEYS.items()
        if key in config and (found := misfit(config[key], shape, key))
    ]
    if not problems:
        if config["format_version"] != FORMAT_VERSION:
            problems.append(f"format_version {config['format_version']}")
        if config["lambda_format"] not in {"full", "diagonal"}:
            problems.append(f"lambda_format {config['lambda_format']!r}")
        problems += [
            f"task {entry!r}"
            for entry in config["tasks"]
            if not is_task_entry(entry) or "output" in entry
        ]
        problems += [
            f"{key} is {config[key]!r}"
            for key in ("target_modules", "head_modules")
            if config[key] != sorted(set(map(str, config[key])))
        ]
        if not config["target_modules"]:
            problems.append("target_modules is empty")
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected=(
                f"exactly the keys of format version {FORMAT_VERSION}, each of its type, because "
                "mtl_export.checkpoint.formats.own_folder documents them"
            ),
            fix="Write the folder with mtl_export.write_checkpoint",
        )
    check_task_names(str(path), [entry["name"] for entry in config["tasks"]])
    return dict(config)


def _check_keys(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    roles = [role for role in SUFFIXES if role != "scaler" or config["learn_scale"]]
    required = {
        f"{module}.{SUFFIXES[role]}" for module in config["target_modules"] for role in roles
    }
    optional = set()
    for module in config["head_modules"]:
        for entry in config["tasks"]:
            required.add(f"heads.{entry['name']}.{module}.weight")
            optional.add(f"heads.{entry['name']}.{module}.bias")
    problems = [f"missing {key!r}" for key in sorted(required - tensors.keys())]
    problems += [f"unknown {key!r}" for key in sorted(tensors.keys() - required - optional)]
    problems += [
        f"{name!r} has dtype {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES
    ]
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected=(
                "floating-point tensors, exactly those that adapter_config.json announces, "
                "because a tensor that is ignored or missing would change the model silently"
            ),
            fix="Make target_modules, head_modules, tasks and learn_scale agree with the weights",
        )


def _check_config_shapes(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    task_count, rank, up_count = len(config["tasks"]), config["r"], config["up_projections"]
    full = config["lambda_format"] == "full"
    lambda_shape = (task_count, rank, rank) if full else (task_count, rank)
    problems = []
    for module in config["target_modules"]:
        down, up = tensors[f"{module}.lora_A"].shape, tensors[f"{module}.lora_B"].shape
        expected = {
            f"{module}.lora_A": (rank, *down[1:2]),
            f"{module}.lora_lambdas": lambda_shape,
            f"{module}.lora_B": (up_count, *up[1:2], rank),
            f"{module}.lora_B_w": (task_count, up_count),
        }
        problems += [
            f"{name!r} is {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if tensors[name].shape != shape
        ]
    for module in config["head_modules"]:
        weights = [f"heads.{entry['name']}.{module}.weight" for entry in config["tasks"]]
        widths = sorted({tensors[name].shape[1:] for name in weights})
        if len(widths) > 1:
            problems.append(f"the tasks' heads {module!r} take {' and '.join(map(str, widths))}")
        for entry, name in zip(config["tasks"], weights, strict=True):
            shape = tensors[name].shape
            if len(shape) != 2 or shape[0] != len(entry["labels"]):
                problems.append(
                    f"{name!r} is {list(shape)}, but the task has {len(entry['labels'])} labels"
                )
            bias = tensors.get(f"heads.{entry['name']}.{module}.bias")
            if bias is not None and bias.shape != shape[:1]:
                problems.append(f"{bias.name!r} is {list(bias.shape)}, not {list(shape[:1])}")
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected=(
                f"T={task_count}, r={rank}, n={up_count}, Lambda {config['lambda_format']}, "
                "because adapter_config.json says so"
            ),
            fix="Correct adapter_config.json or re-save the adapter",
        )
