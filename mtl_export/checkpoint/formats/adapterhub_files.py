"""AdapterHub's folders and files: one ``StoredAdapter`` for each adapter found.

Layouts of ``adapters`` 1.x (https://github.com/adapter-hub/adapters, src/adapters/loading.py):

    save_adapter          DIR/adapter_config.json, DIR/pytorch_adapter.bin, and with a head
                          DIR/head_config.json, DIR/pytorch_model_head.bin
    save_all_adapters     DIR/NAME/... for each adapter; the order of tasks is lost
    save_adapter_setup    the same plus DIR/adapter_setup.json, which holds the order
    save_pretrained       config.json with "adapters" and "prediction_heads", and everything
                          in pytorch_model.bin; the order is lost

With ``use_safetensors`` the weights are in adapter.safetensors and model_head.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.checkpoint import check_task_names
from mtl_export.checkpoint.files.json_file import Shape, checked, json_or_none, read_json
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import CheckpointError, UsageError, shortened

CONFIG_FILE = "adapter_config.json"
SETUP_FILE = "adapter_setup.json"
HEAD_CONFIG_FILE = "head_config.json"
MODEL_CONFIG_FILE = "config.json"
ADAPTER_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
# Compositions under which each row passes through exactly one of the children.
ONE_CHILD_PER_ROW = frozenset({"MultiTask", "BatchSplit", "Parallel"})

# Of what is read. A head's config stands in its own file, or in a whole model's.
ADAPTER: Shape = dict.fromkeys(
    ("name?", "model_class?", "model_type?", "model_name?", "version?"), str
)
METHOD: Shape = {
    "architecture": str,
    "composition_mode?": str,
    "use_gating?": bool,
    "use_dora?": bool,
    "task_specific_matrix_type?": str,
    **dict.fromkeys(("r?", "alpha?", "weights_sharpness?"), float),
}
_LABELS: Shape = {"label2id?": {str: int}, "num_labels?": int}
_FLEXIBLE: Shape = {
    **_LABELS,
    "head_type?": str,
    "layers?": int,
    "activation_function?": str,
    "use_pooler?": bool,
}
HEAD: Shape = {**_LABELS, "config?": _FLEXIBLE, "problem_type?": str}
_SETUP: Shape = {"adapter_setup?": {"type?": str, "children?": [object]}}
_MODEL: Shape = {
    **_LABELS,
    "model_type?": str,
    "architectures?": [str],
    "adapters": {"adapters": {str: str}, "config_map?": {str: object}},
    "prediction_heads?": {str: _FLEXIBLE},
}


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter as it lies on disk.

    Attributes:
        task: Its task's name: the folder's, or its own where it has no folder of its own.
        name: What its keys call it.
        where: Its folder.
        ledger_prefix: Put before its keys where several files use the same ones.
        config: Of the method: "architecture", "r", "alpha" and so on.
        facts: What stands beside it: "model_class", "model_type", "model_name", "version".
        tensors: Of the adapter.
        head_config: Of the head; None when it was saved without one.
        head_tensors: Of the head, by their keys.
        rest: Only of a whole model: everything that is no adapter's and no head's.
        files: All files read.
    """

    task: str
    name: str
    where: Path
    ledger_prefix: str
    config: Mapping[str, Any]
    facts: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    head_config: Mapping[str, Any] | None
    head_tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def model_class(self) -> str:
        """Return the class that saved it."""
        return self.facts["model_class"]


def is_adapterhub(path: Path) -> bool:
    """Return whether ``path`` is a folder that AdapterHub's ``adapters`` wrote."""
    if not path.is_dir():
        return False
    return (
        (path / SETUP_FILE).is_file()
        or is_adapter_folder(path)
        or is_whole_model(path)
        or bool(adapter_folders(path))
    )


def is_adapter_folder(path: Path) -> bool:
    """Return whether ``path`` holds one adapter: PEFT's config has other keys."""
    parsed = json_or_none(path / CONFIG_FILE)
    return parsed is not None and "config" in parsed and "model_class" in parsed


def adapter_folders(path: Path) -> list[Path]:
    """Return the folders in ``path`` that hold one adapter each, by name."""
    return sorted(child for child in path.iterdir() if child.is_dir() and is_adapter_folder(child))


def is_whole_model(path: Path) -> bool:
    """Return whether ``path`` is a model folder with adapters inside its weights."""
    parsed = json_or_none(path / MODEL_CONFIG_FILE)
    adapters = parsed.get("adapters") if parsed else None
    return isinstance(adapters, dict) and bool(adapters.get("adapters"))


def stored_adapters(path: Path, order: Sequence[str] | None) -> tuple[StoredAdapter, ...]:
    """Return the adapters at ``path`` in task id order.

    Args:
        path: A folder that ``is_adapterhub``.
        order: The tasks in id order where the user gave one.

    Raises:
        CheckpointError: The order is lost and was not given, or a file is missing or broken.
        UsageError: ``order`` is not an order of the adapters found.
    """
    if (path / SETUP_FILE).is_file():
        names = _setup_order(path / SETUP_FILE)
        return tuple(_from_folder(path / name, name, f"{name}/") for name in names)
    if is_adapter_folder(path):
        name = read_json(path / CONFIG_FILE, ADAPTER).get("name")
        return (_from_folder(path, name or path.name, ""),)
    if is_whole_model(path):
        return _from_model(path, order)
    found = {folder.name: folder for folder in adapter_folders(path)}
    names = _ordered(path, list(found), order, "folders")
    return tuple(_from_folder(found[name], name, f"{name}/") for name in names)


def _ordered(path: Path, found: list[str], order: Sequence[str] | None, what: str) -> list[str]:
    """Return ``found`` in the order given; one task needs none."""
    if order is None:
        if len(found) == 1:
            return found
        raise CheckpointError(
            f"{path}: {len(found)} adapters ({shortened(found, 12)}) and no {SETUP_FILE}, so "
            "nothing says which task has which id",
            expected=(
                f"the tasks in id order, because the {what} alone do not keep the order in which "
                "the tasks were trained"
            ),
            fix=(
                f"Pass --tasks with these names in id order, such as --tasks {','.join(found)}, or "
                "save with save_adapter_setup"
            ),
        )
    if sorted(order) != sorted(found):
        raise UsageError(
            f"--tasks {','.join(order)}: {path} holds the adapters {shortened(found, 12)}",
            expected="each of these names once, in id order",
            fix="Correct --tasks (or tasks in mtl-export.toml)",
        )
    return list(order)


def _setup_order(file: Path) -> list[str]:
    """Return the adapters in the order of their ids.

    Raises:
        CheckpointError: The setup runs a row through several adapters.
    """
    setup = read_json(file, _SETUP).get("adapter_setup") or {}
    kind, children = setup.get("type") or "", setup.get("children") or []
    names = [_single(child) for child in children]
    if kind == "single" and len(children) == 1 and isinstance(children[0], str):
        kind = "MultiTask"
    if kind not in ONE_CHILD_PER_ROW or None in names or not names:
        raise CheckpointError(
            f"{file}: the adapter setup is {kind or 'empty'}"
            f"{' of compositions' if None in names else ''}",
            expected=(
                f"{' or '.join(sorted(ONE_CHILD_PER_ROW))} of single adapters, because each row "
                "must pass through exactly one adapter, its task's"
            ),
            fix="Save the tasks' adapters with save_adapter_setup(DIR, MultiTask(...))",
        )
    found = [name for name in names if name is not None]
    check_task_names(str(file), found)
    return found


def _single(child: object) -> str | None:
    if isinstance(child, dict) and child.get("type") == "single":
        names = child.get("children")
        if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
            return names[0]
    return child if isinstance(child, str) else None


def _from_folder(folder: Path, task: str, ledger_prefix: str) -> StoredAdapter:
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}",
            expected=(
                f"a folder for every adapter, because {SETUP_FILE} beside it names the adapter"
            ),
            fix="Copy the whole folder",
        )
    stored = read_json(config_path, ADAPTER)
    adapter_file = _one_of(folder, ADAPTER_FILES)
    if adapter_file is None:
        raise CheckpointError(
            f"{folder}: neither {' nor '.join(ADAPTER_FILES)}",
            expected=f"the weights beside {CONFIG_FILE}",
            fix="Copy the whole folder",
        )
    head_path, head_file = folder / HEAD_CONFIG_FILE, _one_of(folder, HEAD_FILES)
    if head_path.is_file() != (head_file is not None):
        raise CheckpointError(
            f"{folder}: only one of {HEAD_CONFIG_FILE} and the head's weights",
            expected="both or neither",
            fix="Copy the whole folder",
        )
    files = [config_path, adapter_file]
    if head_file is not None:
        files += [head_path, head_file]
    return StoredAdapter(
        task=task,
        name=str(stored.get("name") or task),
        where=folder,
        ledger_prefix=ledger_prefix,
        config=_method(config_path, stored.get("config")),
        facts=_facts(stored),
        tensors=MappingProxyType(_tensors(adapter_file)),
        head_config=None if head_file is None else read_json(head_path, HEAD),
        head_tensors=MappingProxyType({} if head_file is None else _tensors(head_file)),
        files=tuple(files),
    )


def _from_model(path: Path, order: Sequence[str] | None) -> tuple[StoredAdapter, ...]:
    """Return the adapters inside a whole model's weights."""
    config = read_json(path / MODEL_CONFIG_FILE, _MODEL)
    hashes, methods = config["adapters"]["adapters"], config["adapters"].get("config_map") or {}
    names = _ordered(path, list(hashes), order, "names in config.json")
    file = _one_of(path, MODEL_FILES)
    if file is None:
        raise CheckpointError(
            f"{path}: neither {' nor '.join(MODEL_FILES)}",
            expected="the weights of the whole model in one file",
            fix="Save each adapter with save_adapter_setup instead: it is also far smaller",
        )
    tensors = _tensors(file)
    architectures = config.get("architectures") or [""]
    facts = {
        "model_class": architectures[0],
        "model_type": config.get("model_type") or "",
        "model_name": "",
        "version": "",
    }
    owned = {name: {k: v for k, v in tensors.items() if f".loras.{name}." in k} for name in hashes}
    base_part = _base_part([key for keys in owned.values() for key in keys], facts["model_class"])
    heads = {
        key: tensor
        for key, tensor in tensors.items()
        if base_part and not key.startswith(base_part)
    }
    taken = {*heads, *(key for keys in owned.values() for key in keys)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in taken}
    stored = []
    for name in names:
        flexible = (config.get("prediction_heads") or {}).get(name)
        stored.append(
            StoredAdapter(
                task=name,
                name=name,
                where=path,
                ledger_prefix="",
                config=_method(path / MODEL_CONFIG_FILE, methods.get(hashes[name])),
                facts=MappingProxyType(facts),
                tensors=MappingProxyType(owned[name]),
                head_config=_model_head_config(config, flexible) if heads else None,
                head_tensors=MappingProxyType(heads),
                files=(path / MODEL_CONFIG_FILE, file),
                rest=MappingProxyType(rest),
            )
        )
    return tuple(stored)


def _base_part(adapter_keys: Sequence[str], model_class: str) -> str:
    """Return how the base's names begin inside the class; "" for a bare base."""
    if model_class.endswith("Model") and not model_class.endswith(
        ("AdapterModel", "LMHeadModel", "DoubleHeadsModel")
    ):
        return ""
    first = {key.partition(".")[0] for key in adapter_keys}
    return f"{first.pop()}." if len(first) == 1 else ""


def _model_head_config(config: dict[str, Any], flexible: object) -> dict[str, Any]:
    """Return what ``head_config.json`` would say."""
    if isinstance(flexible, dict):
        return {"config": flexible}
    return {
        "config": None,
        "label2id": config.get("label2id"),
        "num_labels": len(config.get("label2id") or {}),
        "problem_type": config.get("problem_type"),
    }


def _method(where: Path, config: object) -> Mapping[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(
            f"{where}: the adapter's config is {config!r:.80}",
            expected=(
                'an object with "architecture", as LoRA-like methods have, because bottleneck '
                "adapters, prompts and named presets are no change of a weight"
            ),
            fix=(
                "Export a checkpoint trained with MTLLoRAConfig, LoRAConfig, DoRAConfig or "
                "IA3Config"
            ),
        )
    return MappingProxyType(checked(config, str(where), METHOD))


def _facts(stored: dict[str, Any]) -> Mapping[str, str]:
    keys = ("model_class", "model_type", "model_name", "version")
    return MappingProxyType({key: stored.get(key) or "" for key in keys})


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    present = [folder / name for name in names if (folder / name).is_file()]
    if len(present) > 1:
        raise CheckpointError(
            f"{folder}: both {' and '.join(file.name for file in present)}",
            expected="one of them, because they may come from different runs",
            fix="Delete the one that is out of date",
        )
    return present[0] if present else None


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        from mtl_export.checkpoint.files.torch_pickle import load_state_dict

        return load_state_dict(file)
    return dict(open_safetensors(file).tensors)
