"""Toy checkpoints in the layout of scale-lab/MTLoRA, written the way its trainer does.

Two stages of two blocks are enough: the file's rules depend on "last block" and "last
stage" only. Sizes are unequal; values are random and do not matter to a reader.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TASKS = ("semseg", "sal")
WIDTH, BLOCKS, STAGES = 4, 2, 2
SHARED_SCALE = [1.0, 0.5, 0.75, 1.25]
TASK_SCALES = {"semseg": [0.5, 0.75, 1.0, 1.25], "sal": [1.5, 2.5, 3.5, 4.5]}


class CfgNode(dict[str, Any]):
    """What yacs pickles: a dictionary with attributes of its own."""


CfgNode.__module__ = "yacs.config"


def config(**changes: Any) -> dict[str, Any]:
    """Return a stored configuration; ``changes`` go to MODEL.MTLORA."""
    lora = {
        "SHARED_MODE": "matrix",
        "SPLIT_QKV": False,
        "SHARED_SCALE": SHARED_SCALE,
        "TASK_SCALE": [9.0] * 4,
        "SCALE_PER_TASK_LIST": [
            {task: scales[stage] for task, scales in TASK_SCALES.items()} for stage in range(4)
        ],
    }
    heads = dict.fromkeys(TASKS, "hrnet")
    return {
        "TASKS": list(TASKS),
        "MODEL": {"MTLORA": lora | changes, "DECODER_HEAD": heads},
    }


def state(*, mode: str = "matrix", intermediate: bool = False) -> dict[str, torch.Tensor]:
    """Return a state dict: per stage two blocks, the last one with task terms."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) + 0.1

    tensors = {"backbone.patch_embed.proj.weight": draw(WIDTH, 3, 4, 4)}
    for stage in range(STAGES):
        width = WIDTH * 2**stage
        layers = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (2 * width, width),
            "mlp.fc2": (width, 2 * width),
        }
        for block in range(BLOCKS):
            prefix = f"backbone.layers.{stage}.blocks.{block}"
            tensors[f"{prefix}.norm1.weight"] = draw(width)
            tensors[f"{prefix}.attn.relative_position_index"] = torch.arange(4).view(2, 2)
            for name, (outputs, inputs) in layers.items():
                has_tasks = name != "attn.qkv" and (block == BLOCKS - 1 or intermediate)
                module = f"{prefix}.{name}"
                tensors[f"{module}.linear.weight"] = draw(outputs, inputs)
                tensors[f"{module}.linear.bias"] = draw(outputs)
                if has_tasks and mode == "addition":
                    tensors[f"{module}.lora_norm.weight"] = draw(outputs)
                    tensors[f"{module}.lora_norm.bias"] = draw(outputs)
                else:
                    tensors[f"{module}.lora_shared_A"] = draw(3, inputs)
                    tensors[f"{module}.lora_shared_B"] = draw(outputs, 3)
                for rank, task in enumerate(sorted(TASKS) if has_tasks else (), start=1):
                    tensors[f"{module}.lora_tasks_A.{task}"] = draw(rank, inputs)
                    tensors[f"{module}.lora_tasks_B.{task}"] = draw(outputs, rank)
        tensors[f"backbone.layers.{stage}.downsample.reduction.weight"] = draw(width, 2 * width)
    for channels, task in enumerate(TASKS, start=3):
        tensors[f"downsampler.{task}.downsample_0.weight"] = draw(2, WIDTH, 1, 1)
        head = f"decoders.decoders.{task}.last_layer"
        tensors[f"{head}.1.num_batches_tracked"] = torch.tensor(7)
        tensors[f"{head}.3.weight"] = draw(channels, 8, 1, 1)
    return tensors


def write(
    file: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    settings: dict[str, Any] | None = None,
    **others: Any,
) -> Path:
    """Write ``file`` as the trainer does, with a pickled ``CfgNode``; return it."""
    settings = config() if settings is None else settings
    modules = {"yacs": ModuleType("yacs"), "yacs.config": ModuleType("yacs.config")}
    modules["yacs.config"].CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        document = {
            "model": state() if tensors is None else tensors,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
            "epoch": 0,
            "config": _node(settings),
            **others,
        }
        torch.save(document, file)
    finally:
        for name in modules:
            del sys.modules[name]
    return file


def _node(value: Any) -> Any:
    """Return ``value`` with every dictionary a ``CfgNode`` that carries yacs' flags."""
    if isinstance(value, dict):
        node = CfgNode({key: _node(item) for key, item in value.items()})
        vars(node)["__immutable__"] = True
        vars(node)["__deprecated_keys__"] = set()
        return node
    return [_node(item) for item in value] if isinstance(value, list) else value
