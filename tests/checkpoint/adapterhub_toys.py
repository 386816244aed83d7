"""Toy checkpoints in AdapterHub's layout, for the toy BERT of ``tests.adapters.toys``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.tensors import Array
from tests.adapters import toys
from tests.factories import HIDDEN

MODULES = {name: shape for name, shape in toys.MODULES.items() if "pooler" not in name}
NAMES = ("zeta", "task1", "task10")
LABELS = (2, 4, 1)
RANK, UPS, ALPHA, TAU = 3, 2, 5, 0.4
MTL_CONFIG: dict[str, Any] = {
    "architecture": "mtl_lora", "r": RANK, "alpha": ALPHA, "n_up_projection": UPS,
    "weights_sharpness": TAU, "task_specific_matrix_type": "singular_values",
    "composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None,
    "vera_b": None,
}  # fmt: skip
LORA_CONFIG: dict[str, Any] = {
    "architecture": "lora", "r": RANK, "alpha": ALPHA, "composition_mode": "add",
    "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None,
}  # fmt: skip
DORA_CONFIG = {**LORA_CONFIG, "use_dora": True}
IA3_CONFIG = {**LORA_CONFIG, "r": 1, "alpha": 2, "composition_mode": "scale"}
State = dict[str, Array]


def draw(generator: np.random.Generator, *shape: int) -> Array:
    """Return float32 values at least 0.05 away from zero."""
    signs = generator.choice([-1.0, 1.0], shape)
    values: Array = (signs * generator.uniform(0.05, 0.8, shape)).astype(np.float32)
    return values


def mtl_states(names: Sequence[str] = NAMES, *, is_shared: bool = True) -> dict[str, State]:
    """Return each task's adapter file; A and B are equal unless ``is_shared`` is false."""
    generator = np.random.default_rng(3)
    states: dict[str, State] = {name: {} for name in names}
    for module, (outputs, inputs) in MODULES.items():
        factors = [
            (draw(generator, RANK, inputs), draw(generator, UPS, outputs, RANK)) for _ in names
        ]
        for name, own in zip(names, factors, strict=True):
            down, up = factors[0] if is_shared else own
            prefix = f"{module}.loras.{name}"
            states[name] |= {
                f"{prefix}.lora_A": down,
                f"{prefix}.lora_B": up,
                f"{prefix}.task_specific.values": draw(generator, RANK),
                f"{prefix}.weights": draw(generator, UPS),
            }
    return states


def single_state(name: str, config: Mapping[str, Any], seed: int = 0) -> State:
    """Return the file of a LoRA, DoRA or (IA)^3 adapter."""
    generator = np.random.default_rng(seed)
    state: State = {}
    for module, (outputs, inputs) in MODULES.items():
        prefix = f"{module}.loras.{name}"
        if config["composition_mode"] == "scale":
            state[f"{prefix}.lora_B"] = draw(generator, outputs, 1)
            continue
        state[f"{prefix}.lora_A"] = draw(generator, int(config["r"]), inputs)
        state[f"{prefix}.lora_B"] = draw(generator, outputs, int(config["r"]))
        if config["use_dora"]:
            state[f"{prefix}.m.weight"] = np.abs(draw(generator, outputs, 1)) + 1
    return state


def head_config(labels: int, **settings: Any) -> dict[str, Any]:
    """Return a flexible head's config as the library writes it."""
    return {
        "head_type": "classification", "num_labels": labels, "layers": 2,
        "activation_function": "tanh", "use_pooler": False, "bias": True, "dropout_prob": None,
        "label2id": {f"L{index}": index for index in range(labels)}, **settings,
    }  # fmt: skip


def head_state(name: str, config: Mapping[str, Any], seed: int = 0) -> State:
    """Return a flexible head's file: dropout, linear, function, dropout, linear."""
    generator = np.random.default_rng(1000 + seed)
    layers, step = int(config["layers"]), 3 if config["activation_function"] else 2
    state: State = {}
    for layer in range(layers):
        outputs = int(config["num_labels"]) if layer == layers - 1 else HIDDEN
        key = f"heads.{name}.{1 + layer * step}"
        state[f"{key}.weight"] = draw(generator, outputs, HIDDEN)
        state[f"{key}.bias"] = draw(generator, outputs)
    return state


def write_state(folder: Path, stem: str, state: State, *, is_safetensors: bool) -> None:
    """Write one file of weights under either of its names."""
    if is_safetensors:
        from safetensors.numpy import save_file

        save_file(state, str(folder / f"{stem.removeprefix('pytorch_')}.safetensors"))
    else:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in state.items()}
        torch.save(tensors, folder / f"{stem}.bin")


def write_adapter(
    folder: Path,
    name: str,
    state: State,
    config: Mapping[str, Any],
    *,
    model_class: str = "BertAdapterModel",
    model_type: str = "bert",
    version: str = "adapters.1.3.0",
    head: tuple[Mapping[str, Any], State] | None = None,
    is_safetensors: bool = False,
) -> None:
    """Write what ``save_adapter`` writes; ``head`` is ``head_config.json``'s content and state."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "model_class": model_class, "model_type": model_type, "name": name, "version": version,
        "model_name": "toy/bert", "hidden_size": HIDDEN,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", {"config": dict(config), **facts})
    write_state(folder, "pytorch_adapter", state, is_safetensors=is_safetensors)
    if head is not None:
        write_json(folder / "head_config.json", {**facts, **head[0]})
        write_state(folder, "pytorch_model_head", head[1], is_safetensors=is_safetensors)


def write_setup(folder: Path, names: Sequence[str], kind: str = "MultiTask") -> None:
    """Write ``adapter_setup.json``."""
    children = [{"type": "single", "children": [name]} for name in names]
    setup = {"type": kind, "children": children}
    write_json(folder / "adapter_setup.json", {"adapter_setup": setup, "head_setup": None})


def write_mtl(
    folder: Path,
    *,
    is_shared: bool = True,
    has_setup: bool = True,
    is_safetensors: bool = False,
    config: Mapping[str, Any] | None = None,
    labels: Sequence[int] = LABELS,
    head: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Write three MTL-LoRA tasks with flexible heads; every head file holds all heads."""
    configs = [head_config(count, **(head or {})) for count in labels]
    heads: State = {}
    for index, name in enumerate(NAMES):
        heads |= head_state(name, configs[index], index)
    for name, state, own in zip(
        NAMES, mtl_states(is_shared=is_shared).values(), configs, strict=True
    ):
        write_adapter(
            folder / name, name, state, {**MTL_CONFIG, **(config or {})},
            head=({"config": own}, heads), is_safetensors=is_safetensors, **facts,
        )  # fmt: skip
    if has_setup:
        write_setup(folder, NAMES)
    return folder


def write_json(file: Path, document: Mapping[str, Any]) -> None:
    """Write ``document``."""
    file.write_text(json.dumps(document), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of an object on disk; those of its "config" where it has them."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        target = document["config"] if key in (document.get("config") or {}) else document
        target[key] = value
    write_json(file, document)
