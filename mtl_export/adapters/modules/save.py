"""Save a trained ``MultiTaskModel`` as our checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from mtl_export.adapters.modules.model import MultiTaskModel, TaskHeads
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.adapters.modules.ta_lora import TALoRALinear
from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    HeadTensors,
    LayerTensors,
    Task,
)
from mtl_export.checkpoint.convert import write_checkpoint
from mtl_export.checkpoint.formats.own_folder import FORMAT
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import OutputError

# Layers that can be trained here; each says its family, tensors and numbers.
TRAINABLE = (MTLLoRALinear, TALoRALinear)


def save_checkpoint(
    model: MultiTaskModel,
    path: str | Path,
    *,
    tasks: tuple[Task, ...],
    base: BaseReference,
    overwrite: bool = False,
) -> None:
    """Write ``model``'s adapters and heads to the folder ``path``.

    Args:
        model: Adapted with layers of one class of ``TRAINABLE``.
        path: Folder to create (see ``mtl_export.checkpoint.formats.own_folder``).
        tasks: In id order.
        base: The base it was trained on; ``BaseReference(id, open_base(id).sha256)``.
        overwrite: Replace what the folder holds.

    Raises:
        OutputError: The folder holds something, and ``overwrite`` was not asked for.
        CheckpointError: Names of tasks, or their labels and the rows of a head, do not fit.
    """
    path = Path(path)
    if path.exists() and not overwrite and (path.is_file() or any(path.iterdir())):
        raise OutputError(
            f"{path}: it is there already",
            expected="a new or an empty folder",
            fix="Pass another path, or overwrite=True",
        )
    modules = dict(model.model.named_modules())
    adapted = {name: layer for name, layer in modules.items() if isinstance(layer, TRAINABLE)}
    heads = {name: module for name, module in modules.items() if isinstance(module, TaskHeads)}
    (family,) = {layer.family for layer in adapted.values()}
    checkpoint = Checkpoint(
        path=path,
        format=FORMAT,
        family=family,
        tasks=tasks,
        layers=MappingProxyType(
            {
                name: LayerTensors(
                    name,
                    {role: _tensor(role, value) for role, value in layer.tensors().items()},
                    layer.hyper(),
                )
                for name, layer in adapted.items()
            }
        ),
        heads=MappingProxyType(
            {
                name: tuple(_head(module.heads[task.index]) for task in tasks)
                for name, module in heads.items()
            }
        ),
        base=base,
        model_class=type(model.model).__name__,
        sha256="",
    )
    write_checkpoint(path, checkpoint)


def _tensor(name: str, value: torch.Tensor) -> Tensor:
    is_double = value.dtype == torch.float64
    wide = torch.float64 if is_double else torch.float32  # lossless either way
    array = value.detach().cpu().to(wide).numpy()
    return Tensor(name, "F64" if is_double else "F32", tuple(array.shape), lambda: array)


def _head(head: nn.Module) -> HeadTensors:
    bias = dict(head.named_parameters()).get("bias")
    return HeadTensors(
        _tensor("weight", head.get_parameter("weight")),
        None if bias is None else _tensor("bias", bias),
    )
