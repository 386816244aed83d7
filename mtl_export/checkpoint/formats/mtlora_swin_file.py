"""MTLoRA's ``ckpt_epoch_N.pth``: state dict and configuration, unpickled with care.

The file holds a yacs ``CfgNode``, which becomes a dictionary; yacs is not imported.

A state dict alone is read too: the configuration is then the YAML file that the trainer
writes (``config.json``, its name notwithstanding) or reads (``cfg.yaml``) beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.torch_pickle import load_pickle, named_tensors, stored_names
from mtl_export.checkpoint.files.yaml_file import read_yaml
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import CheckpointError, UsageError, shortened

FILE_NAME = re.compile(r"ckpt_epoch_(\d+)\.pth")
CONFIG_FILES = ("config.json", "cfg.yaml")
SUFFIXES = frozenset({".pth", ".pt"})
# The repository's own has some 300 values in 8 KB, 4 deep; YAML takes a second for 100 KB.
MAX_CONFIG_VALUES, MAX_CONFIG_DEPTH = 100_000, 32
TELLING = re.compile(r".+\.(lora_shared_[AB]|lora_tasks_[AB]\..+|lora_norm\.weight)")


@dataclass(frozen=True)
class StoredModel:
    """What one file holds.

    Attributes:
        files: The files read.
        tensors: The model's state dict.
        config: The training configuration, as plain dictionaries and lists.
        others: Names of what lies beside the model in the file: training state.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    others: tuple[str, ...]


def candidates(path: Path) -> list[Path]:
    """Return the checkpoint files that ``path`` is or holds, by epoch."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    found = [
        (int(match[1]), child)
        for child in (path.iterdir() if path.is_dir() else ())
        if (match := FILE_NAME.fullmatch(child.name)) and child.is_file()
    ]
    return [child for _, child in sorted(found)]


def is_mtlora(path: Path) -> bool:
    """Return whether ``path`` is, or holds, a checkpoint of that repository or a fork of it."""
    files = candidates(path)
    return bool(files) and any(map(TELLING.fullmatch, stored_names(files[-1])))


def read_stored(path: Path, train_config: Path | None = None) -> StoredModel:
    """Return what the only checkpoint file in ``path`` holds.

    Args:
        path: The file, or its folder.
        train_config: YAML of the training run, where the file has no configuration in it.

    Raises:
        IntegrityError: It asks for something that is not in the list.
        CheckpointError: There are several files, it is broken, or the configuration is missing.
    """
    files = candidates(path)
    if len(files) != 1:
        raise CheckpointError(
            f"checkpoint {path}: {len(files)} checkpoints: "
            f"{shortened(file.name for file in files)}",
            expected="one, because none is marked as the best",
            fix="Point --checkpoint at one of the files",
        )
    (file,) = files
    loaded = load_pickle(file)
    loaded = loaded if isinstance(loaded, dict) else {"": loaded}
    model = loaded["model"] if isinstance(loaded.get("model"), dict) else loaded
    tensors = named_tensors(file, model)
    others = (
        () if model is loaded else tuple(str(k) for k in loaded if k not in {"model", "config"})
    )
    config = None if model is loaded else loaded.get("config")
    if isinstance(config, dict):
        if train_config is not None:
            raise UsageError(
                f"--config {train_config}: {file} holds its own configuration",
                expected="no other, because what was trained with decides the numbers",
                fix="Leave out --config",
            )
        _check_plain(file, config)
        return StoredModel((file,), tensors, config, others)
    config, source = _config_of(file, train_config)
    return StoredModel((file, source), tensors, config, others)


def _check_plain(file: Path, config: object) -> None:
    """Refuse what no configuration is: lists that hold themselves, or each other many times."""
    waiting, count = [(config, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        children = list(value.values()) if isinstance(value, dict) else value
        keys = list(value) if isinstance(value, dict) else []
        is_long = isinstance(value, int) and value.bit_length() > 64
        if is_long or depth > MAX_CONFIG_DEPTH or count > MAX_CONFIG_VALUES:
            raise _no_config(file, "a configuration that is too large, or nested too deep")
        if not all(isinstance(key, str) for key in keys):
            raise _no_config(file, "a setting whose name is no text")
        if isinstance(children, list | tuple | set):
            waiting += [(child, depth + 1) for child in children]


def _no_config(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {found}", expected="the training configuration", fix="Copy the file again"
    )


def _config_of(file: Path, given: Path | None) -> tuple[dict[str, Any], Path]:
    """Return the configuration that was given, or lies beside the file, and its own file."""
    beside = (file.parent / name for name in CONFIG_FILES)
    source = given or next(filter(Path.is_file, beside), None)
    if source is None:
        raise CheckpointError(
            f"{file}: no configuration in it, and no {' or '.join(CONFIG_FILES)} beside it",
            expected=(
                "the training configuration, because the scales are not in the state dict, and "
                "two of the modes have the same keys"
            ),
            fix="Pass the YAML of the training run as --config run.yaml",
        )
    if not source.is_file():
        raise UsageError(
            f"--config {source}: no such file",
            expected="the YAML of the training run",
            fix="Correct --config",
        )
    config = read_yaml(source)
    if not isinstance(config, dict):
        raise _no_config(source, "no dictionary of settings")
    _check_plain(source, config)
    return config, source
