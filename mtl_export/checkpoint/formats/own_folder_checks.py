"""What our own folder must look like; ``own_folder`` documents it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.checkpoint import POOLINGS, TASK_KINDS, Checkpoint, check_task_names
from mtl_export.checkpoint.files.json_file import Shape, misfit, read_json
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Tensor
from mtl_export.errors import CheckpointError, shortened

FORMAT = "mtl-export"
VERSION = 2
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEYS: dict[str, Shape] = {
    "format": str,
    "format_version": int,
    "adapter_type": str,
    "tasks": [object],
    "model_class": str,
    "base_model_name_or_path": str,
    "base_sha256": str,
    "readout": object,
    "layers": {str: object},
    "head_modules": [str],
    "replaced": [str],
    "rows": {str: [int]},
    "members": bool,
}
# Part of module names, so without dots.
OUTPUT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def checked_config(path: Path) -> dict[str, Any]:
    """Return the config in the file ``path``.

    Raises:
        CheckpointError: With everything that is wrong with it.
    """
    config = read_json(path)
    version = config.get("format_version", VERSION)
    if version != VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r:.80}",
            expected=f"format_version {VERSION}, the only one there is",
            fix="Save the trained adapter again with this mtl-export: mtl_export.write_checkpoint",
        )
    problems = [f"no {key!r}" for key in KEYS if key not in config]
    problems += [f"unknown {key!r}" for key in config if key not in {*KEYS, "outputs"}]
    problems += [
        found[0]
        for key, shape in KEYS.items()
        if key in config and (found := misfit(config[key], shape, key))
    ]
    if not problems:
        problems = _problems(config)
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected=(
                f"exactly the keys of format version {VERSION}, each of its type, because "
                "mtl_export.checkpoint.formats.own_folder documents them"
            ),
            fix="Write the folder again with mtl-export inspect --convert",
        )
    check_task_names(str(path), [entry["name"] for entry in config["tasks"]])
    return dict(config)


def _problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong inside the values of a config with the right keys."""
    problems = [f"task {entry!r}" for entry in config["tasks"] if not _is_task_entry(entry)]
    problems += [
        f"{key} is {config[key]!r}"
        for key in ("head_modules", "replaced")
        if config[key] != sorted(set(map(str, config[key])))
    ]
    problems += [
        f"layer {module}: {entry!r}"
        for module, entry in config["layers"].items()
        if not _is_layer_entry(entry)
    ]
    problems += [
        f"rows {name}: {indices!r}"
        for name, indices in config["rows"].items()
        if min(indices, default=0) < 0 or len(set(indices)) != len(indices)
    ]
    readout = config["readout"]
    if readout is not None and not _is_readout(readout, {"pooling", "activations"}):
        problems.append(f"readout is {readout!r}")
    problems += _output_problems(config)
    holds = [key for key in ("layers", "head_modules", "replaced", "rows") if config[key]]
    if config["members"] and holds:
        problems.append(f"members, and {' and '.join(holds)} beside them")
    return problems


def _is_readout(entry: object, keys: set[str]) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == keys
        and entry["pooling"] in POOLINGS
        and isinstance(entry["activations"], list)
        and all(isinstance(name, str) for name in entry["activations"])
    )


def _output_problems(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with outputs that only some tasks have."""
    outputs = config.get("outputs", [])
    of_tasks = {str(entry.get("output", "")) for entry in config["tasks"]
                if isinstance(entry, dict)}  # fmt: skip
    if not outputs:
        return [f"outputs is {outputs!r}"] * ("outputs" in config) + [
            f"output {name!r} of a task is not described" for name in sorted(of_tasks - {""})
        ]
    keys = {"name", "pooling", "activations", "is_bare"}
    if config["readout"] is not None or not isinstance(outputs, list):
        return ["outputs beside a readout"]
    bad = [
        f"output {entry!r}"
        for entry in outputs
        if not (
            _is_readout(entry, keys)
            and type(entry["is_bare"]) is bool
            and isinstance(entry["name"], str)
            and OUTPUT_NAME.fullmatch(entry["name"])
        )
    ]
    if bad:
        return bad
    names = [entry["name"] for entry in outputs]
    if len(set(names)) < len(names) or set(names) != of_tasks:
        return [f"the tasks' outputs are {sorted(of_tasks)}, described are {names}"]
    return []


def _is_layer_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"roles", "hyper", "embedding"}
        and isinstance(entry["embedding"], bool)
        and isinstance(entry["roles"], list)
        and bool(entry["roles"])
        and entry["roles"] == sorted(set(map(str, entry["roles"])))
        and misfit(entry["hyper"], {str: float}) is None
    )


def check_tensors(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check that the file ``path`` holds the tensors its config announces, and no other.

    Raises:
        CheckpointError: With every difference.
    """
    required = {f"layers.{m}.{role}" for m, entry in config["layers"].items()
                for role in entry["roles"]}  # fmt: skip
    heads = [
        f"heads.{index}.{module}"
        for module in config["head_modules"]
        for index, task in enumerate(config["tasks"])
        if not task.get("output") or module.startswith(f"head.{task['output']}.")
    ]
    replaced = {f"replaced.{name}" for name in config["replaced"]}
    required |= {f"{head}.weight" for head in heads} | replaced
    required |= {f"rows.{name}" for name in config["rows"]}
    optional = {f"{head}.bias" for head in heads}
    problems = [f"missing {key!r}" for key in sorted(required - tensors.keys())]
    problems += [f"unknown {key!r}" for key in sorted(tensors.keys() - required - optional)]
    problems += [
        f"{name!r} has dtype {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES and name not in replaced
    ]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for head in heads:
        weight = shapes.get(f"{head}.weight", (0, 0))
        if len(weight) != 2 or shapes.get(f"{head}.bias", weight[:1]) != weight[:1]:
            problems.append(f"{head!r} has a weight {list(weight)} and a bias that does not fit")
    for name, indices in config["rows"].items():
        if shapes.get(f"rows.{name}", (len(indices),))[:1] != (len(indices),):
            problems.append(f"'rows.{name}' is not {len(indices)} rows")
    if problems:
        raise CheckpointError(
            f"{path}: {shortened(problems)}",
            expected=(
                f"exactly the tensors that {CONFIG_FILE} announces, because a tensor that is "
                "ignored or missing would change the model silently"
            ),
            fix="Copy both files of one save",
        )


def _is_task_entry(entry: object) -> bool:
    """Return whether ``entry`` is an item of ``tasks`` in a config."""
    return (
        isinstance(entry, dict)
        and entry.keys() - {"output"} == {"name", "labels", "kind"}
        and isinstance(entry.get("output", ""), str)
        and isinstance(entry["name"], str)
        and isinstance(entry["labels"], list)
        and all(isinstance(label, str) for label in entry["labels"])
        and entry["kind"] in TASK_KINDS
        and (entry["kind"] == "headless") == (not entry["labels"])
    )


def no_file(path: Path, name: str) -> CheckpointError:
    """Return the error for a file that the config announces and the folder lacks."""
    return CheckpointError(
        f"{path}: no {name}",
        expected=f"{name}, which {CONFIG_FILE} announces",
        fix="Copy the whole folder",
    )


def refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Refuse a number, such as alpha, that is NaN or infinite: JSON has no word for it."""
    bad = [
        f"{layer.module}: {name} = {value}"
        for layer in checkpoint.layers.values()
        for name, value in layer.hyper.items()
        if not math.isfinite(value)
    ]
    if bad:
        raise CheckpointError(
            f"{checkpoint.path}: {shortened(bad)}",
            expected="finite numbers",
            fix="Pass the value used in training, e.g. with --alpha",
        )
