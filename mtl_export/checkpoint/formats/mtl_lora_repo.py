"""Checkpoints of the MTL-LoRA authors' repository: one pickled state dict, no config.

``<run>/checkpoint/final_checkpoint.pt`` holds every state-dict entry whose name contains
``lora``, keys relative to the bare Hugging Face model (a part ``module`` is dropped wherever
it stands, as the repository's own loader does). Source of names, shapes and rules:
https://github.com/pUmpKin-Co/MTL-LoRA/tree/7848a70/src, files adapter/*.py and
utils/peft_loading_utilts.py.

| suffix after the module                              | family         | role                |
|------------------------------------------------------|----------------|---------------------|
| lora_A [1, r, I] or [1, g r, I]                       | mtl_lora(_fused) | down              |
| lora_lambdas [T, r, r] or [T, r]                      | same           | lambda              |
| lora_B [n, O, r], lora_B_w [T, n]                     | mtl_lora       | up, mixing          |
| lora_B_{q,k,v} [n, h, r], lora_B_{q,k,v}_w [T, n]     | mtl_lora_fused | up_q, mixing_q, ... |
| lora_scaler []                                        | same           | scaler              |
| lora_A.loraA.i.mlp.weight, lora_B.loraB.i.mlp.weight  | moe_lora       | down, up            |
| lora_A.loraA.i.weight, lora_B.loraB.i.weight          | moe_lora       | dead: the same twice |
| lora_gate.GateL.weight, lora_task_embedding.weight    | moe_lora       | gate                |
| lora_A [n, r, I], lora_B [n, O, r], lora_scaling [n, O] | multi_lora   | down, up, scaling_rows |
| lora_A.weight, lora_B.weight                          | lora           | down, up            |
| the same and lora_weight_m_wdecomp.weight [O, 1]      | dora           | magnitude           |

The file carries neither alpha nor the temperature nor task names: they are asked for. The
random biases that the repository's wrapper adds to bias-free layers are not in the file
either; they are frozen noise that no seed reproduces, so exports have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    LayerTensors,
    LedgerEntry,
    Task,
)
from mtl_export.checkpoint.files.torch_pickle import load_state_dict, stored_names
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError, shortened

NAME = "official"
FILE = "final_checkpoint.pt"
# What DistributedDataParallel and DeepSpeed put before a model's names.
WRAPPER = "module"
NO_HIDDEN_BIAS = (
    "the trainer's wrapper gives bias-free layers a random, frozen bias that it does not save; "
    "exports leave it out, as the paper's equation does"
)
# suffix -> role; the family is told by which roles a module has
_PLAIN = {
    "lora_A": "down",
    "lora_lambdas": "lambda",
    "lora_B": "up",
    "lora_B_w": "mixing",
    "lora_scaler": "scaler",
    "lora_scaling": "scaling_rows",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_weight_m_wdecomp.weight": "magnitude",
    "lora_gate.GateL.weight": "gate_weight",
    "lora_task_embedding.weight": "task_embedding",
    **{f"lora_B_{letter}": f"up_{letter}" for letter in "qkv"},
    **{f"lora_B_{letter}_w": f"mixing_{letter}" for letter in "qkv"},
}
_EXPERT = re.compile(r"lora_([AB])\.lora\1\.(\d+)\.(mlp\.)?weight")
_KEY = re.compile(r"(?:(?P<module>.+?)\.)?(?P<suffix>lora_.+)")
# roles that tell a family -> family
_FAMILIES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"lambda", "mixing", "up"}), "mtl_lora"),
    (frozenset({"lambda", "down"}), "mtl_lora_fused"),
    (frozenset({"gate_weight", "task_embedding"}), "moe_lora"),
    (frozenset({"scaling_rows"}), "multi_lora"),
    (frozenset({"magnitude"}), "dora"),
    (frozenset({"down", "up"}), "lora"),
)


def checkpoint_file(path: Path) -> Path | None:
    """Return the checkpoint file that ``path`` is or holds."""
    candidates = (path, path / FILE, path / "checkpoint" / FILE)
    return next((file for file in candidates if file.is_file()), None)


def is_official(path: Path) -> bool:
    """Return whether ``path`` is, or holds, an adapter-only state dict of that repository."""
    file = checkpoint_file(path)
    if file is None or file.suffix not in {".pt", ".pth", ".bin"}:
        return False
    names = stored_names(file)
    ours = [name for name in names if (key := _KEY.fullmatch(name)) and _role(key["suffix"])]
    # PEFT's keys end the same way but all begin with base_model.
    return bool(ours) and not any(name.startswith("base_model.") for name in names)


def read_official(path: Path) -> Checkpoint:
    """Return the checkpoint that ``path`` is or holds.

    Raises:
        CheckpointError: A tensor is unknown, empty, missing or of a wrong dtype; modules
            are of different families; aliases differ.
        IntegrityError: The pickle asks to run code.
    """
    file = checkpoint_file(path)
    if file is None:
        raise CheckpointError(f"{path}: no {FILE}", expected="a checkpoint file")
    tensors = unwrapped(file, load_state_dict(file))
    modules = _by_module(file, tensors)
    families = sorted({_family(file, module, roles) for module, roles in modules.items()})
    if len(families) != 1:
        raise CheckpointError(
            f"{file}: layers of different families: {', '.join(families)}",
            expected="one family, because that repository trains one adapter type a run",
            fix="Save the state dict of a single run",
        )
    family = families[0]
    layers = {
        module: LayerTensors(module, _roles(file, family, module, roles), MappingProxyType({}))
        for module, roles in modules.items()
    }
    task_count = _task_count(file, layers)
    return Checkpoint(
        path=path,
        format=NAME,
        family=family,
        tasks=tuple(Task(f"task{index}", index) for index in range(task_count)),
        layers=MappingProxyType(layers),
        heads=MappingProxyType({}),
        base=BaseReference(),
        model_class="",
        sha256=sha256_of_files([file]),
        ledger=_ledger(tensors, layers),
        notes=(NO_HIDDEN_BIAS,),
    )


def unwrapped(file: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name, without the part that a wrapper adds to it."""
    tensors: dict[str, Tensor] = {}
    twice = []
    for key, tensor in stored.items():
        name = ".".join(part for part in key.split(".") if part != WRAPPER)
        if name in tensors:
            twice.append(f"{name!r} twice")
        tensors[name] = tensor
    if twice:
        raise CheckpointError(
            f"{file}: {shortened(twice)}",
            expected=f"each tensor once, with or without {WRAPPER!r} in its name",
            fix="Save the state dict of a single run",
        )
    return tensors


def _role(suffix: str) -> str | None:
    if suffix in _PLAIN:
        return _PLAIN[suffix]
    expert = _EXPERT.fullmatch(suffix)
    if expert is None:
        return None
    alias = "" if expert[3] else "alias_"
    return f"{alias}expert_{expert[1]}_{int(expert[2])}"


def _by_module(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by module and role, once every key is understood."""
    modules: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name)
        role = _role(key["suffix"]) if key else None
        if key is None or role is None:
            problems.append(f"unknown {name!r}")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name!r} has dtype {tensor.dtype}")
        elif 0 in tensor.shape:
            problems.append(f"{name!r} is empty (a ZeRO-3 run saves it so)")
        else:
            modules.setdefault(key["module"] or "", {})[role] = tensor
    if problems:
        raise CheckpointError(
            f"{file}: {shortened(problems)}",
            expected=(
                "adapter tensors of that repository, and no other, because a tensor that is "
                "ignored would change the model silently"
            ),
            fix="Save only the entries whose name contains 'lora', as the trainer does",
        )
    return modules


def _family(file: Path, module: str, roles: Mapping[str, Tensor]) -> str:
    for telling, family in _FAMILIES:
        if telling <= roles.keys():
            return family
    raise CheckpointError(
        f"{file}: {module}: tensors {', '.join(sorted(roles))}",
        expected="all tensors of one adapter layer",
        fix="Save the adapter again",
    )


def _roles(
    file: Path, family: str, module: str, stored: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return what the family's file expects, from what the repository stores."""
    if family == "moe_lora":
        return _expert_roles(file, module, stored)
    roles = dict(stored)
    if family in {"mtl_lora", "mtl_lora_fused"}:
        roles["down"] = without_first(file, roles["down"])
    if family == "dora":
        roles["magnitude"] = _flattened(roles["magnitude"])
    if family == "multi_lora":
        # A parameter that this class registers and never reads.
        roles.pop("scaler", None)
    return MappingProxyType(roles)


def without_first(file: Path, tensor: Tensor) -> Tensor:
    """Return ``lora_A [1, r, I]`` as ``[r, I]``."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        raise CheckpointError(
            f"{file}: {tensor.name!r}: shape {list(tensor.shape)}",
            expected="[1, r, I], because all tasks share one down-projection",
            fix="Save the adapter again",
        )
    return Tensor(tensor.name, tensor.dtype, tensor.shape[1:], lambda: tensor.numpy()[0])


def _flattened(tensor: Tensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype, tensor.shape[:1], lambda: tensor.numpy().reshape(-1))


def _expert_roles(file: Path, module: str, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return experts stacked and the gate's logits: GateL . embedding of each task."""
    experts = stored["gate_weight"].shape[0]
    sides = {
        side: [stored.get(f"expert_{side}_{index}") for index in range(experts)] for side in "AB"
    }
    known = {f"{alias}expert_{side}_{i}" for alias in ("", "alias_") for side in "AB"
             for i in range(experts)} | {"gate_weight", "task_embedding"}  # fmt: skip
    down = [tensor for tensor in sides["A"] if tensor is not None]
    up = [tensor for tensor in sides["B"] if tensor is not None]
    problems = [f"unknown {role}" for role in sorted(stored.keys() - known)]
    if len(down) != experts or len(up) != experts:
        problems.append(f"{len(down)} A and {len(up)} B for {experts} experts")
    problems += [f"{t.name!r} is {list(t.shape)}" for t in down if t.shape != down[0].shape]
    problems += [f"{t.name!r} is {list(t.shape)}" for t in up if t.shape != up[0].shape]
    problems += [
        f"{tensor.name!r} differs from its .mlp twin"
        for role, tensor in stored.items()
        if (twin := role.removeprefix("alias_")) != role
        and twin in stored
        and not np.array_equal(tensor.numpy(), stored[twin].numpy())
    ]
    gate, embedding = stored["gate_weight"], stored["task_embedding"]
    if gate.shape[1:] != embedding.shape[1:]:
        problems.append(f"gate {list(gate.shape)}, embedding {list(embedding.shape)}")
    if problems:
        raise CheckpointError(
            f"{file}: {module}: {shortened(problems)}",
            expected=(
                f"{experts} experts of one shape, each stored twice and equal, because the gate "
                "has that many outputs"
            ),
            fix="Save the adapter again",
        )
    # The embedding's last row belongs to id T, which no task has.
    tasks = embedding.shape[0] - 1

    def logits() -> Array:
        product: Array = embedding.widened()[:tasks].astype(np.float64) @ gate.widened().T
        return product

    return MappingProxyType(
        {
            "down": _stacked(down),
            "up": _stacked(up),
            "gate": Tensor(gate.name, "F64", (tasks, experts), logits),
        }
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    return Tensor(
        first.name,
        first.dtype,
        (len(tensors), *first.shape),
        lambda: np.stack([tensor.numpy() for tensor in tensors]),
    )


def _task_count(file: Path, layers: Mapping[str, LayerTensors]) -> int:
    counts = {
        layer.tensors[role].shape[0]
        for layer in layers.values()
        for role in ("lambda", "gate")
        if role in layer.tensors
    }
    if len(counts) > 1:
        raise CheckpointError(
            f"{file}: layers for {', '.join(map(str, sorted(counts)))} tasks",
            expected="one number of tasks",
            fix="Save the state dict of a single run",
        )
    return counts.pop() if counts else 1


def _ledger(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LayerTensors]
) -> tuple[LedgerEntry, ...]:
    """Return what becomes of every key of the file."""
    entries = []
    for name in tensors:
        role = _role(_KEY.fullmatch(name)["suffix"]) or ""  # type: ignore[index]
        if role.startswith("alias_"):
            entries.append(LedgerEntry(name, "known-dead", "the same expert, stored twice"))
        elif role == "scaler" and not any("scaler" in la.tensors for la in layers.values()):
            entries.append(LedgerEntry(name, "known-dead", "the class never reads it"))
        elif role in {"lambda", "gate_weight", "task_embedding"} or role.startswith("mixing"):
            entries.append(LedgerEntry(name, "stacked"))
        else:
            entries.append(LedgerEntry(name, "folded"))
    return tuple(entries)
