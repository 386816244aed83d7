"""From settings to what commands work on: checkpoint, base, tasks, recipes.

Nothing heavy is imported at the top: commands import this file for their ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError, shortened

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import OptionValue, Recipe
    from mtl_export.checkpoint.base_model import BaseModel
    from mtl_export.checkpoint.checkpoint import Checkpoint, Task


def open_settings_checkpoint(settings: Settings) -> Checkpoint:
    """Return the checkpoint that ``settings`` name; tensors stay on disk.

    Raises:
        UsageError: They name none.
    """
    from mtl_export.checkpoint.reader import open_checkpoint, open_with_train_config

    if settings.checkpoint is None:
        in_file = f", or set checkpoint in {settings.config_file}" if settings.config_file else ""
        raise UsageError(
            "--checkpoint: no checkpoint was given",
            expected="the trained adapter: a file or folder",
            fix=f"Pass --checkpoint PATH{in_file}",
        )
    if settings.train_config is not None:
        return open_with_train_config(settings.checkpoint, settings.train_config, settings.tasks)
    found = open_checkpoint(
        settings.checkpoint,
        alpha=settings.alpha,
        temperature=settings.temperature,
        downsample=settings.downsample,
        task_names=settings.tasks,
        biases=settings.biases,
    )
    # What stands in a settings file may be meant for other checkpoints.
    is_meant = not settings.config_file or "image_size" in settings.typed
    if settings.image_size is not None and is_meant and found.swin is None:
        raise UsageError(
            f"--image-size {settings.image_size}: {settings.checkpoint} takes no images of its own",
            expected="it beside an MTLoRA file, whose model takes images of one size",
            fix="Leave out --image-size",
        )
    return found


def open_settings_base(settings: Settings, checkpoint: Checkpoint) -> BaseModel:
    """Return the base that ``settings`` name.

    Raises:
        UsageError: They name none.
    """
    from mtl_export.checkpoint.base_model import open_base

    if settings.base is None:
        trained_on = checkpoint.base.id
        raise UsageError(
            "--base: no base model was given",
            expected="the model the adapter was trained on"
            + (f" (the checkpoint says {trained_on})" if trained_on else ""),
            fix=f"Pass --base {trained_on or 'DIR_OR_HUB_ID'}, or set base in mtl-export.toml",
        )
    return open_base(settings.base)


def open_bound(
    settings: Settings, *, check_hash: bool = True, targets: Sequence[Path] | None = None
) -> BoundModel:
    """Return the checkpoint bound to its base, every shape checked.

    Args:
        settings: Name both.
        check_hash: Check the base's hash as well, if the checkpoint names one.
        targets: Where the command writes; None: to ``--output`` and to the output folder.

    Raises:
        UsageError: A target lies in the checkpoint or base.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters

    checkpoint = open_settings_checkpoint(settings)
    _refuse_unknown(settings, checkpoint.tasks)
    base = open_settings_base(settings, checkpoint)
    if targets is None:
        targets = [settings.output_dir, *([settings.output] if settings.output else [])]
    for target in targets:
        is_output = target == settings.output
        refuse_in_source(
            target,
            checkpoint,
            base,
            where=f"--output {target}" if is_output else f"output folder {target}",
            fix="Pass another folder to --output"
            if is_output
            else "Set another dir under [output] in mtl-export.toml, or pass --output",
        )
    return bind(checkpoint, read_adapters(checkpoint, base), base, check_hash=check_hash)


def selected_tasks(settings: Settings, tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return the tasks asked for, in id order; a checkpoint's only task needs no asking.

    Raises:
        TaskNotFoundError: One of the names is unknown.
        UsageError: None was asked for and there are several.
    """
    _refuse_unknown(settings, tasks)
    if settings.all_tasks or (not settings.task and len(tasks) == 1):
        return tuple(tasks)
    if not settings.task:
        raise UsageError(
            "--task: no task was asked for",
            expected=f"one or more of {shortened((task.name for task in tasks), 12)}",
            fix="Pass --task NAME (repeatable) or --all-tasks",
        )
    return tuple(task for task in tasks if task.name in settings.task)


def recipe(command: str, bound: BoundModel, options: dict[str, OptionValue]) -> Recipe:
    """Return what decides the bytes of one output folder.

    Args:
        command: The verb.
        bound: The sources, and the numbers and names given for what they do not carry.
        options: The command's own options that change the bytes.
    """
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.checkpoint.base_model import settings_sha256
    from mtl_export.version import VERSION

    return Recipe(
        command=command,
        options={
            **hyper_parameters(bound.checkpoint),
            "tasks": [task.name for task in bound.adapters.tasks],
            **options,
        },
        sources={
            "base_sha256": bound.base.sha256,
            "base_settings_sha256": settings_sha256(bound.base),
            "checkpoint_sha256": bound.adapters.checkpoint_sha256,
        },
        tool_version=VERSION,
    )


def hyper_parameters(checkpoint: Checkpoint) -> dict[str, float | None]:
    """Return the numbers all layers share, by name; None where layers differ or have none."""
    from mtl_export.checkpoint.own_classes import switches_of

    names = ("alpha", "temperature", *switches_of(checkpoint.model_class))
    layers = [layer for part in checkpoint.members or (checkpoint,)
              for layer in part.layers.values()]  # fmt: skip
    found = {name: {layer.hyper.get(name) for layer in layers} for name in names}
    return {name: next(iter(v)) if len(v) == 1 else None for name, v in found.items()}


def refuse_in_source(
    target: Path, checkpoint: Checkpoint, base: BaseModel | None, *, where: str, fix: str
) -> None:
    """Refuse to write into what is read.

    Args:
        target: What would be written.
        checkpoint: One source.
        base: The other, if there is one.
        where: Who asked for ``target``.
        fix: What to do.

    Raises:
        UsageError: ``target`` is one of them, or lies in it.
    """
    folders = {"checkpoint": checkpoint.path, "base": base.folder if base else None}
    found = lies_in(target, folders)
    if found:
        expected = "another folder, because sources are never written to"
        raise UsageError(f"{where}: {found}", expected=expected, fix=fix)


def lies_in(place: Path, folders: Mapping[str, Path | None]) -> str:
    """Return in which of ``folders`` a place is or lies, as a phrase; empty if in none."""
    there = {name: folder for name, folder in folders.items() if folder and folder.is_dir()}
    for name, folder in there.items():
        if place.resolve().is_relative_to(folder.resolve()):
            return f"it lies in the {name}, {folder}"
    return ""


def _refuse_unknown(settings: Settings, tasks: Sequence[Task]) -> None:
    from mtl_export.checkpoint.checkpoint import task_named

    for name in settings.task:
        task_named(tuple(tasks), name)


def other_source(bound: BoundModel, metadata: Mapping[str, str]) -> str:
    """Return from what else than this model a graph says it was made; empty if from this."""
    now = {"base": bound.base.sha256, "checkpoint": bound.adapters.checkpoint_sha256}
    for name, digest in now.items():
        found = metadata.get(f"mtl_export.{name}_sha256", "")
        if found != digest:
            was = f"{name} {found[:12]}..." if found else f"an unknown {name}"
            return f"made from {was}, not from this one ({digest[:12]}...)"
    return ""
