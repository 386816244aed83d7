"""Save a trained ``MultiTaskModel`` as our checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mtl_export.adapters.modules.model import MultiTaskModel, TaskHeads
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.folder import write_folder
from mtl_export.checkpoint.tensors import Array


def save_checkpoint(
    model: MultiTaskModel, path: Path, *, tasks: tuple[Task, ...], base: BaseReference
) -> None:
    """Write ``model``'s adapters and heads to the folder ``path``.

    Args:
        model: Adapted with ``MTLLoRALinear`` layers that share alpha and temperature.
        path: Folder to create (see ``mtl_export.checkpoint.folder``).
        tasks: In id order.
        base: The base it was trained on; ``BaseReference(id, open_base(id).sha256)``.
    """
    adapted = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, MTLLoRALinear)
    }
    heads = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, TaskHeads)
    }
    first = next(iter(adapted.values()))
    write_folder(
        path,
        tasks=tasks,
        layers={
            name: {role: _numpy(value) for role, value in module.tensors().items()}
            for name, module in adapted.items()
        },
        heads={
            name: {task.name: _head(module.heads[task.index]) for task in tasks}
            for name, module in heads.items()
        },
        alpha=first.scaling * first.down.shape[0],
        temperature=first.temperature,
        model_class=type(model.model).__name__,
        base=base,
    )


def _numpy(value: torch.Tensor) -> Array:
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32  # lossless either way
    array: Array = value.detach().cpu().to(wide).numpy()
    return array


def _head(head: nn.Module) -> tuple[Array, Array | None]:
    weight, bias = head.get_parameter("weight"), dict(head.named_parameters()).get("bias")
    return _numpy(weight), None if bias is None else _numpy(bias)
