"""Every class of the MTL-LoRA authors' repository as a toy checkpoint, and its deltas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from tests.adapters.toys import memory_tensor
from tests.checkpoint import official_toys as toys
from tests.checkpoint.official_toys import Drawer, State

Make = Callable[[Drawer, int, int], State]


def case(make: Callable[..., State], dtype: str = "F32", **options: Any) -> tuple[Make, str]:
    """Return a generator of one layer's state with its options fixed, and its dtype."""
    return lambda draw, outputs, inputs: make(draw, outputs, inputs, **options), dtype


CASES = {
    "mtl_lora": case(toys.mtl_lora),
    "mtl_lora diagonal": case(toys.mtl_lora, diagonal=True),
    "mtl_lora scaler": case(toys.mtl_lora, scaler=True),
    "mtl_lora one task": case(toys.mtl_lora, tasks=1),
    "mtl_lora one B": case(toys.mtl_lora, ups=1),
    "mtl_lora bf16": case(toys.mtl_lora, "BF16"),
    "mtl_lora fp16": case(toys.mtl_lora, "F16", scaler=True),
    "mtl_lora_fused": case(toys.mtl_lora_fused),
    "mtl_lora_fused diagonal": case(toys.mtl_lora_fused, diagonal=True, scaler=True),
    "mtl_lora_fused without k": case(toys.mtl_lora_fused, enabled="qv", mixed="qv"),
    "mtl_lora_fused only k": case(toys.mtl_lora_fused, enabled="k", mixed="k"),
    "mtl_lora_fused one B for k": case(toys.mtl_lora_fused, mixed="qv"),
    "moe_lora": case(toys.moe_lora),
    "moe_lora bf16": case(toys.moe_lora, "BF16"),
    "multi_lora": case(toys.multi_lora),
    "multi_lora unused scaler": case(toys.multi_lora, scaler=True),
    "lora": case(toys.lora),
    "dora": case(toys.dora),
}
FOR_TASKS = [name for name in CASES if name.partition(" ")[0] not in {"multi_lora", "lora", "dora"}]


def layer_states(name: str) -> dict[str, State]:
    """Return the case's state of every toy module."""
    make, dtype = CASES[name]
    modules = toys.FUSED_MODULES if "fused" in name else toys.MODULES
    return {
        module: make(Drawer(seed, dtype), *shape)
        for seed, (module, shape) in enumerate(modules.items(), start=3)
    }


def base_of(modules: Any) -> BaseModel:
    """Return a base in memory that has these modules."""
    weights = {f"{module}.weight": toys.base_weight(module) for module in modules}
    return BaseModel(
        reference="toy",
        folder=Path("toy"),
        config=MappingProxyType({"architectures": ["LlamaForCausalLM"]}),
        tensors=MappingProxyType({n: memory_tensor(n, value) for n, value in weights.items()}),
        weight_files=(),
    )


def opened(path: Path, **given: Any) -> Checkpoint:
    """Return the checkpoint at ``path`` with the toys' alpha and temperature."""
    return open_checkpoint(path, **{"alpha": toys.ALPHA, "temperature": toys.TEMPERATURE, **given})


def written(folder: Path, states: dict[str, State], prefix: str = "") -> Path:
    """Write ``states`` where the trainer does and return the run's folder."""
    toys.write(folder / "checkpoint" / "final_checkpoint.pt", toys.flat(states, prefix))
    return folder


def deltas(checkpoint: Checkpoint) -> dict[tuple[str, int], Array]:
    """Return the delta of every module and task, from the normal form."""
    adapters = read_adapters(checkpoint, base_of(checkpoint.layers))
    found = {}
    for module, layer in adapters.layers.items():
        weight = toys.base_weight(module).astype(np.float64)
        for task in adapters.tasks:
            merged = weight + layer.delta(task.index)
            if layer.gain is not None:
                merged = layer.gain[task.index][:, None] * merged
            found[module, task.index] = merged - weight
    return found
