"""MTLoRA's ``ckpt_epoch_N.pth``: state dict and configuration, unpickled with care.

The file holds a yacs ``CfgNode``, which ``torch.load(weights_only=True)`` cannot rebuild.
It is unpickled here by an unpickler that knows the names in ``ALLOWED`` and no other; a
``CfgNode`` becomes a dictionary, and yacs is not imported. The opcodes are checked against
the same list before the first one is executed.

A state dict alone is read too: the configuration is then the YAML file that the trainer
writes (``config.json``, its name notwithstanding) or reads (``cfg.yaml``) beside it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mtl_export.checkpoint.tensors import Tensor
from mtl_export.checkpoint.torch_pickle import pickled_strings, refuse_foreign, tensor_record
from mtl_export.errors import CheckpointError, IntegrityError, shortened

FILE_NAME = re.compile(r"ckpt_epoch_(\d+)\.pth")
CONFIG_FILES = ("config.json", "cfg.yaml")
ALLOWED = frozenset({"yacs.config CfgNode", "__builtin__ set", "builtins set"})
SUFFIXES = frozenset({".pth", ".pt"})
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
        for child in path.iterdir()
        if (match := FILE_NAME.fullmatch(child.name))
    ]
    return [child for _, child in sorted(found)]


def is_mtlora(path: Path) -> bool:
    """Return whether ``path`` is, or holds, a checkpoint of that repository or a fork of it."""
    files = candidates(path)
    return bool(files) and any(map(TELLING.fullmatch, pickled_strings(files[-1])))


def read_stored(path: Path) -> StoredModel:
    """Return what the only checkpoint file in ``path`` holds.

    Raises:
        IntegrityError: It asks for something that is not in the list.
        CheckpointError: There are several files, it is broken, or the configuration is missing.
    """
    files = candidates(path)
    if len(files) != 1:
        raise CheckpointError(
            where=f"checkpoint {path}",
            found=f"{len(files)} checkpoints: {shortened(file.name for file in files)}",
            expected="one",
            why="none is marked as the best",
            fix="Point --checkpoint at one of the files",
        )
    (file,) = files
    loaded = _unpickled(file)
    model = loaded["model"] if isinstance(loaded.get("model"), dict) else loaded
    tensors = _tensors(file, model)
    others = () if model is loaded else tuple(k for k in loaded if k not in {"model", "config"})
    config = None if model is loaded else loaded.get("config")
    if isinstance(config, dict):
        return StoredModel((file,), tensors, config, others)
    config, source = _config_beside(file)
    return StoredModel((file, source), tensors, config, others)


class _ConfigNode(dict[str, Any]):
    """Stands in for ``yacs.config.CfgNode``: a dictionary, its flags forgotten."""

    def __setstate__(self, state: object) -> None:
        """Ignore whether the node was frozen."""


def _unpickled(file: Path) -> dict[str, Any]:
    import torch

    refuse_foreign(file, ALLOWED)
    try:
        loaded = torch.load(
            file,
            map_location="cpu",
            weights_only=False,
            pickle_module=SimpleNamespace(
                Unpickler=_Unpickler, load=pickle.load, __name__="restricted pickle"
            ),
            mmap=zipfile.is_zipfile(file),
        )
    except IntegrityError:
        raise
    except Exception as error:
        # torch raises RuntimeError, EOFError, pickle and zip errors; all mean a broken file.
        raise CheckpointError(
            where=str(file),
            found=f"it cannot be read ({type(error).__name__}: {str(error).splitlines()[:1]})",
            expected="a whole file written by torch.save",
            fix="Copy the file again; compare its size with the original",
        ) from error
    return loaded if isinstance(loaded, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Finds what ``ALLOWED`` and plain tensors need, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of that name.

        Raises:
            IntegrityError: It is not in the list.
        """
        import collections

        import torch

        known = {
            "yacs.config CfgNode": _ConfigNode,
            "__builtin__ set": set,
            "builtins set": set,
            "collections OrderedDict": collections.OrderedDict,
            "torch._utils _rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
            "torch._utils _rebuild_parameter": torch._utils._rebuild_parameter,
        }
        if f"{module} {name}" not in known:
            raise IntegrityError(
                where="pickle",
                found=f"it asks for {module} {name}",
                expected=f"nothing but {shortened(sorted(known), 8)}",
                why="loading a pickle runs whatever it imports",
                fix="Do not load it",
            )
        return known[f"{module} {name}"]


def _tensors(file: Path, model: Mapping[Any, Any]) -> dict[str, Tensor]:
    import torch

    bad = [
        f"{key!r} is a {type(value).__name__}"
        for key, value in model.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if bad or not model:
        raise CheckpointError(
            where=str(file),
            found=shortened(bad),
            expected='"model", a dictionary of names to tensors',
            fix="Save the checkpoint again with the trainer",
        )
    return {key: tensor_record(key, value) for key, value in model.items()}


def _config_beside(file: Path) -> tuple[dict[str, Any], Path]:
    import yaml  # type: ignore[import-untyped]  # transformers depends on it

    for name in CONFIG_FILES:
        source = file.parent / name
        if source.is_file():
            try:
                config = yaml.safe_load(source.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    where=str(source), found=f"no YAML ({type(error).__name__})",
                    expected="the training configuration", fix="Copy the file again",
                ) from error  # fmt: skip
            if isinstance(config, dict):
                return config, source
    raise CheckpointError(
        where=str(file),
        found=f"no configuration in it, and no {' or '.join(CONFIG_FILES)} beside it",
        expected="the training configuration",
        why="the scales are not in the state dict, and two of the modes have the same keys",
        fix="Copy config.json of the training run beside it",
    )
