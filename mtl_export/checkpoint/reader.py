"""Open a checkpoint whatever wrote it: each format says whether a path is its own.

Adding a format means one file here and one row in ``FORMATS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mtl_export.checkpoint.checkpoint import (
    Checkpoint,
    LayerTensors,
    check_label_counts,
    check_task_names,
)
from mtl_export.checkpoint.files.contained import check_links
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.files.torch_pickle import refuse_code
from mtl_export.checkpoint.formats import adapterhub, mtlora_swin, peft, peft_config
from mtl_export.checkpoint.formats import mtl_lora_repo as official
from mtl_export.checkpoint.formats import vl_bart as official_vlbart
from mtl_export.checkpoint.formats.own_folder import FORMAT, is_own_folder, read_folder
from mtl_export.checkpoint.hidden_biases import with_biases
from mtl_export.checkpoint.own_classes import switches_of
from mtl_export.errors import CheckpointError, UsageError, shortened


@dataclass(frozen=True, slots=True)
class Format:
    """One producer of checkpoints.

    Attributes:
        name: Short name, as ``inspect`` prints it.
        description: Who writes it, for people.
        looks_for: What makes a path its own, for the error when nothing fits.
        is_mine: Decides by content, reading no tensor.
        read: Returns the checkpoint.
        read_in_order: The same with the tasks in the order given, for a format that may lose
            their order; such a format's ``read`` refuses what it cannot order and names
            ``--tasks``. It raises ``UsageError`` unless the names are its own.
    """

    name: str
    description: str
    looks_for: str
    is_mine: Callable[[Path], bool]
    read: Callable[[Path], Checkpoint]
    read_in_order: Callable[[Path, Sequence[str]], Checkpoint] | None = None


FORMATS: tuple[Format, ...] = (
    Format(
        name=FORMAT,
        description="mtl-export's own folder",
        looks_for='a folder with adapter_config.json whose "format" is "mtl-export"',
        is_mine=is_own_folder,
        read=read_folder,
    ),
    Format(
        name=peft.FORMAT,
        description="Hugging Face PEFT: one LoRA adapter, or one folder per task",
        looks_for=f'a folder (or folders) with {peft_config.CONFIG_FILE} that has a "peft_type"',
        is_mine=peft.is_peft,
        read=peft.read_peft,
        read_in_order=peft.read_peft_in_order,
    ),
    Format(
        name=mtlora_swin.FORMAT,
        description=mtlora_swin.DESCRIPTION,
        looks_for=mtlora_swin.LOOKS_FOR,
        is_mine=mtlora_swin.is_mtlora,
        read=mtlora_swin.read_mtlora,
        read_in_order=mtlora_swin.read_mtlora,
    ),
    Format(
        name=official_vlbart.NAME,
        description="a VL-BART of the MTL-LoRA authors' repository, as a whole",
        looks_for=f"{official_vlbart.FILE} with keys such as"
        " module.model.encoder.visual_embedding....",
        is_mine=official_vlbart.is_vlbart,
        read=official_vlbart.read_vlbart,
    ),
    Format(
        name=official.NAME,
        description="the MTL-LoRA authors' repository (pUmpKin-Co/MTL-LoRA)",
        looks_for="final_checkpoint.pt, alone or under checkpoint/, with keys such as"
        " ....q_proj.lora_lambdas",
        is_mine=official.is_official,
        read=official.read_official,
    ),
    Format(
        name=adapterhub.FORMAT,
        description=adapterhub.DESCRIPTION,
        looks_for=adapterhub.LOOKS_FOR,
        is_mine=adapterhub.is_adapterhub,
        read=adapterhub.read_adapterhub,
        read_in_order=adapterhub.read_adapterhub,
    ),
)


def open_checkpoint(
    path: Path,
    *,
    alpha: float | None = None,
    temperature: float | None = None,
    downsample: bool | None = None,
    task_names: Sequence[str] | None = None,
    biases: Path | None = None,
) -> Checkpoint:
    """Return the checkpoint at ``path``; tensors stay on disk.

    Args:
        path: File or folder.
        alpha: LoRA alpha, where the checkpoint does not carry it.
        temperature: Softmax temperature, where the checkpoint does not carry it.
        downsample: Whether a VL-BART was trained with ``--downsample``, likewise.
        task_names: Names in id order, where the checkpoint does not carry them.
        biases: File of biases that the trainer added and the checkpoint does not carry.

    Raises:
        UsageError: ``path`` does not exist, or a value given contradicts the checkpoint.
        CheckpointError: No format recognises it, or the one that does finds it broken.
        IntegrityError: It is a pickle that asks to run code, or a link out of its folder.
    """
    if not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"checkpoint {path}: "
            f"{'it is a device or a pipe' if path.exists() else 'no such file or folder'}",
            expected="a trained multi-task LoRA checkpoint",
            fix="Correct --checkpoint (or checkpoint in mtl-export.toml)",
        )
    if path.is_dir():
        check_links(path)
    for entry in FORMATS:
        if entry.is_mine(path):
            if task_names is not None and entry.read_in_order is not None:
                check_task_names("--tasks", list(task_names))
                checkpoint = entry.read_in_order(path, task_names)
            else:
                checkpoint = entry.read(path)
            checkpoint = with_hyper(checkpoint, {"alpha": alpha, "temperature": temperature})
            if downsample is not None:
                checkpoint = _with_switch(checkpoint, "downsample", is_on=downsample)
            checkpoint = _with_task_names(checkpoint, task_names)
            check_label_counts(checkpoint)
            return checkpoint if biases is None else with_biases(checkpoint, biases)
    _refuse_broken_config(path)
    refuse_code(path)
    seen = sorted(child.name for child in path.iterdir()) if path.is_dir() else [path.name]
    raise CheckpointError(
        f"checkpoint {path}: no known checkpoint; it holds {shortened(seen, 8)}",
        expected=f"{' or '.join(entry.looks_for for entry in FORMATS)}",
        fix="Point --checkpoint at the folder that the trainer wrote",
    )


def open_with_train_config(
    path: Path, train_config: Path, task_names: Sequence[str] | None = None
) -> Checkpoint:
    """Return an MTLoRA file that has no configuration in it.

    Args:
        path: File or folder.
        train_config: YAML of the training run.
        task_names: Names in id order, where the configuration lists none.

    Raises:
        UsageError: ``path`` is no such file, or there is no such configuration.
        CheckpointError: One of the two is broken, or they do not fit each other.
    """
    if not path.exists() or not mtlora_swin.is_mtlora(path):
        raise UsageError(
            f"--config {train_config}: no training configuration belongs to {path}",
            expected="an MTLoRA file, such as ckpt_epoch_9.pth",
            fix="Leave out --config, or pass an mtl-export.toml",
        )
    return mtlora_swin.read_mtlora(path, task_names, train_config=train_config)


def _refuse_broken_config(path: Path) -> None:
    """Refuse a folder whose config, or that of a folder in it, is no JSON object.

    Every format asks the config what it is, so that none takes a broken one for its own.
    """
    name = peft_config.CONFIG_FILE
    configs = [path / name, *sorted(path.glob(f"*/{name}"))] if path.is_dir() else []
    for config in filter(Path.is_file, configs):
        read_json(config, expected="a JSON object, as the trainer wrote it")


def with_hyper(checkpoint: Checkpoint, given: dict[str, float | None]) -> Checkpoint:
    """Fill in numbers that no layer carries.

    Raises:
        UsageError: A layer carries another one.
    """
    if checkpoint.members:
        members = tuple(with_hyper(member, given) for member in checkpoint.members)
        return dataclasses.replace(checkpoint, members=members)
    wanted = {name: value for name, value in given.items() if value is not None}
    for name, value in wanted.items():
        carried = {layer.hyper[name] for layer in checkpoint.layers.values() if name in layer.hyper}
        if carried - {value}:
            raise UsageError(
                f"--{name} {value:g}: the checkpoint itself says "
                f"{', '.join(f'{v:g}' for v in sorted(carried))}",
                expected=(
                    "no value, or the same one, because the delta must be computed with the "
                    "number used in training"
                ),
                fix=f"Leave out --{name}",
            )
    if not wanted:
        return checkpoint
    members = tuple(with_hyper(member, given) for member in checkpoint.members)
    layers = {
        module: LayerTensors(module, layer.tensors, MappingProxyType({**wanted, **layer.hyper}))
        for module, layer in checkpoint.layers.items()
    }
    return dataclasses.replace(checkpoint, layers=MappingProxyType(layers), members=members)


def _with_switch(checkpoint: Checkpoint, name: str, *, is_on: bool) -> Checkpoint:
    """Fill in a switch of the training command that no layer carries."""
    typed = f"--{name}" if is_on else f"--no-{name}"
    carried = {layer.hyper.get(name, float(is_on)) for layer in checkpoint.layers.values()}
    if name not in switches_of(checkpoint.model_class):
        raise UsageError(
            f"{typed}: a checkpoint of {checkpoint.model_class or 'an unknown class'}",
            expected="a VL-BART, because no other model that is exported has this switch",
            fix=f"Leave out {typed} (or {name} in mtl-export.toml)",
        )
    if carried - {float(is_on)}:
        raise UsageError(
            f"{typed}: the checkpoint itself says the contrary",
            expected=(
                "nothing, or what the checkpoint says, because the model must be the one that was "
                "trained"
            ),
            fix=f"Leave out {typed}",
        )
    return with_hyper(checkpoint, {name: float(is_on)})


def _with_task_names(checkpoint: Checkpoint, names: Sequence[str] | None) -> Checkpoint:
    if names is None:
        return checkpoint
    check_task_names("--tasks", list(names))
    own = [task.name for task in checkpoint.tasks]
    if list(names) == own:
        return checkpoint
    placeholder = [f"task{index}" for index in range(len(own))]
    if own != placeholder or len(names) != len(own):
        raise UsageError(
            f"--tasks {','.join(names)}: the checkpoint has {len(own)} tasks: {shortened(own)}",
            expected="no names, or the same ones in id order"
            if own != placeholder
            else f"{len(own)} names in id order",
            fix="Correct --tasks (or tasks in mtl-export.toml)",
        )
    tasks = tuple(
        dataclasses.replace(task, name=name)
        for task, name in zip(checkpoint.tasks, names, strict=True)
    )
    return dataclasses.replace(checkpoint, tasks=tasks)
