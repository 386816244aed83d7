"""Toy checkpoints in the key layout of the MTL-LoRA authors' repository, and their deltas.

``states`` draws what each class of that repository registers, under its own names;
``delta`` is the class's equation in plain loops, from those names, in float64. Sizes are all
different, so that a transpose or a swap is caught; nothing is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array

ALPHA, TEMPERATURE = 7.0, 0.3
RANK, UPS, TASKS, EXPERTS = 3, 2, 4, 2
# module -> (outputs, inputs): the published targets and an MLP's, of unequal sizes.
MODULES = {
    "model.layers.0.self_attn.q_proj": (6, 5),
    "model.layers.1.mlp.down_proj": (5, 8),
}
FUSED_MODULES = {"transformer.h.0.attn.c_attn": (12, 5)}
BLOCK = 4

State = dict[str, Array]


class Drawer:
    """Seeded values at least 0.05 away from zero, rounded to ``dtype`` and kept so."""

    def __init__(self, seed: int, dtype: str = "F32") -> None:
        self._generator = np.random.default_rng(seed)
        self._dtype = NUMPY_DTYPES[dtype]

    def __call__(self, *shape: int) -> Array:
        """Return an array of this shape."""
        signs = self._generator.choice([-1.0, 1.0], shape)
        values = np.asarray(signs * self._generator.uniform(0.05, 0.8, shape))
        return values.astype(self._dtype)


def mtl_lora(
    draw: Drawer,
    outputs: int,
    inputs: int,
    *,
    tasks: int = TASKS,
    ups: int = UPS,
    diagonal: bool = False,
    scaler: bool = False,
) -> State:
    """Return what mLoRALinear registers."""
    state = {
        "lora_A": draw(1, RANK, inputs),
        "lora_lambdas": draw(tasks, RANK) if diagonal else draw(tasks, RANK, RANK),
        "lora_B": draw(ups, outputs, RANK),
        "lora_B_w": draw(tasks, ups),
    }
    return state | ({"lora_scaler": draw()} if scaler else {})


def mtl_lora_fused(
    draw: Drawer,
    outputs: int,
    inputs: int,
    *,
    enabled: str = "qkv",
    mixed: str = "qkv",
    diagonal: bool = False,
    scaler: bool = False,
) -> State:
    """Return what mLoRAMergedLinear registers; a block not in ``mixed`` has one shared B."""
    width = RANK * len(enabled)
    state = {
        "lora_A": draw(1, width, inputs),
        "lora_lambdas": draw(TASKS, width) if diagonal else draw(TASKS, width, width),
    }
    for letter in enabled:
        state[f"lora_B_{letter}"] = draw(UPS if letter in mixed else 1, BLOCK, RANK)
        if letter in mixed:
            state[f"lora_B_{letter}_w"] = draw(TASKS, UPS)
    return state | ({"lora_scaler": draw()} if scaler else {})


def moe_lora(draw: Drawer, outputs: int, inputs: int) -> State:
    """Return what MMOELoraLinear registers: every expert twice, and one embedding too many."""
    state = {
        "lora_task_embedding.weight": draw(TASKS + 1, 7),
        "lora_gate.GateL.weight": draw(EXPERTS, 7),
    }
    for index in range(EXPERTS):
        for side, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            expert = draw(*shape)
            state[f"lora_{side}.lora{side}.{index}.mlp.weight"] = expert
            state[f"lora_{side}.lora{side}.{index}.weight"] = expert
    return state


def multi_lora(draw: Drawer, outputs: int, inputs: int, *, scaler: bool = False) -> State:
    """Return what MultiLoRALinear registers."""
    state = {
        "lora_A": draw(UPS, RANK, inputs),
        "lora_B": draw(UPS, outputs, RANK),
        "lora_scaling": draw(UPS, outputs),
    }
    return state | ({"lora_scaler": draw()} if scaler else {})


def lora(draw: Drawer, outputs: int, inputs: int) -> State:
    """Return what LoRALinear registers."""
    return {"lora_A.weight": draw(RANK, inputs), "lora_B.weight": draw(outputs, RANK)}


def dora(draw: Drawer, outputs: int, inputs: int) -> State:
    """Return what DoRALinear registers; magnitudes may be negative, as in that class."""
    return {
        **lora(draw, outputs, inputs),
        "lora_weight_m_wdecomp.weight": draw(outputs, 1),
    }


def base_weight(module: str) -> Array:
    """Return the toy base's weight of one module."""
    shape = {**MODULES, **FUSED_MODULES}[module]
    return np.random.default_rng(len(module)).normal(size=shape).astype(np.float32)


def delta(
    state: Mapping[str, Array],
    weight: Array,
    task: int,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
) -> Array:
    """Return one module's delta for one task, from the repository's own names."""
    values = {name: value.astype(np.float64) for name, value in state.items()}
    scale = alpha / RANK
    if "lora_scaler" in values and "lora_scaling" not in values:
        scale /= 1.0 + math.exp(-float(values["lora_scaler"]))
    if "lora_gate.GateL.weight" in values:
        return _moe_delta(values, task, alpha)
    if "lora_lambdas" in values:
        core = values["lora_lambdas"][task]
        core = np.diag(core) if core.ndim == 1 else core
        inner = core @ values["lora_A"][0]
        if "lora_B" in values:
            return np.asarray(scale * _mixed(values, "lora_B", task, temperature) @ inner)
        return np.asarray(scale * _blocks(values, inner, weight.shape, task, temperature))
    if "lora_scaling" in values:
        parts = zip(values["lora_scaling"], values["lora_B"], values["lora_A"], strict=True)
        summed = np.sum([np.diag(row) @ up @ down for row, up, down in parts], axis=0)
        return np.asarray(scale * summed)
    product = np.asarray(scale * values["lora_B.weight"] @ values["lora_A.weight"])
    if "lora_weight_m_wdecomp.weight" not in values:
        return product
    direction = weight.astype(np.float64) + product
    rows = [
        float(magnitude) / math.sqrt(sum(float(v) ** 2 for v in row)) * row
        for magnitude, row in zip(
            values["lora_weight_m_wdecomp.weight"][:, 0], direction, strict=True
        )
    ]
    return np.asarray(np.array(rows) - weight)


def _mixed(values: Mapping[str, Array], name: str, task: int, temperature: float) -> Array:
    ups = values[name]
    if f"{name}_w" not in values:
        return np.asarray(ups[0])
    logits = [float(w) / temperature for w in values[f"{name}_w"][task]]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    mixed = np.zeros_like(ups[0])
    for power, up in zip(powers, ups, strict=True):
        mixed += power / sum(powers) * up
    return np.asarray(mixed)


def _blocks(
    values: Mapping[str, Array], inner: Array, shape: tuple[int, ...], task: int, temperature: float
) -> Array:
    result = np.zeros(shape)
    position = 0
    for place, letter in enumerate("qkv"):
        if f"lora_B_{letter}" not in values:
            continue
        rows = inner[position * RANK : (position + 1) * RANK]
        up = _mixed(values, f"lora_B_{letter}", task, temperature)
        result[place * BLOCK : (place + 1) * BLOCK] = up @ rows
        position += 1
    return result


def _moe_delta(values: Mapping[str, Array], task: int, alpha: float) -> Array:
    embedding = values["lora_task_embedding.weight"][task]
    logits = [float(row @ embedding) for row in values["lora_gate.GateL.weight"]]
    powers = [math.exp(logit) for logit in logits]
    return sum(
        alpha / (EXPERTS * RANK) * power / sum(powers)
        * values[f"lora_B.loraB.{index}.mlp.weight"] @ values[f"lora_A.loraA.{index}.mlp.weight"]
        for index, power in enumerate(powers)
    )  # type: ignore[return-value]  # fmt: skip


def flat(states: Mapping[str, State], prefix: str = "") -> State:
    """Return the state dict of a whole model: ``<prefix><module>.<name>``."""
    return {
        f"{prefix}{module}.{name}": value
        for module, state in states.items()
        for name, value in state.items()
    }


def write(file: Path, state: Mapping[str, Array]) -> Path:
    """Write ``state`` as the trainer does, with ``torch.save``, and return the file."""
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: _torch(value) for name, value in state.items()}, file)
    return file


def _torch(value: Array) -> object:
    import torch

    if value.dtype == NUMPY_DTYPES["BF16"]:
        return torch.from_numpy(value.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
