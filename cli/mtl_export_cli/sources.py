"""From settings to what commands work on: checkpoint, base, tasks, recipes.

Nothing heavy is imported at the top: commands import this file for their ``--help``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_export.errors import UsageError, shortened
from mtl_export_cli.options import Settings

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
    from mtl_export.checkpoint.reader import open_checkpoint

    if settings.checkpoint is None:
        raise UsageError(
            where="--checkpoint",
            found="no checkpoint was given",
            expected="the trained adapter: a file or folder",
            fix="Pass --checkpoint PATH, or set checkpoint in mtl-export.toml",
        )
    return open_checkpoint(
        settings.checkpoint,
        alpha=settings.alpha,
        temperature=settings.temperature,
        task_names=settings.tasks,
        biases=settings.biases,
    )


def open_settings_base(settings: Settings, checkpoint: Checkpoint) -> BaseModel:
    """Return the base that ``settings`` name.

    Raises:
        UsageError: They name none.
    """
    from mtl_export.checkpoint.base_model import open_base

    if settings.base is None:
        trained_on = checkpoint.base.id
        raise UsageError(
            where="--base",
            found="no base model was given",
            expected="the model the adapter was trained on"
            + (f" (the checkpoint says {trained_on})" if trained_on else ""),
            fix=f"Pass --base {trained_on or 'DIR_OR_HUB_ID'}, or set base in mtl-export.toml",
        )
    return open_base(settings.base)


def open_bound(settings: Settings, *, check_hash: bool = True) -> BoundModel:
    """Return the checkpoint bound to its base, every shape checked.

    Args:
        settings: Name both.
        check_hash: Check the base's hash as well, if the checkpoint names one.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters

    checkpoint = open_settings_checkpoint(settings)
    _refuse_unknown(settings, checkpoint.tasks)
    base = open_settings_base(settings, checkpoint)
    _refuse_output_in_source(settings, checkpoint, base)
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
            where="--task",
            found="no task was asked for",
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
            "checkpoint_sha256": bound.adapters.checkpoint_sha256,
        },
        tool_version=VERSION,
    )


def hyper_parameters(checkpoint: Checkpoint) -> dict[str, float | None]:
    """Return the numbers all layers share, by name; None where layers differ or have none."""
    layers = [layer for part in checkpoint.members or (checkpoint,)
              for layer in part.layers.values()]  # fmt: skip
    found = {name: {layer.hyper.get(name) for layer in layers} for name in ("alpha", "temperature")}
    return {name: next(iter(v)) if len(v) == 1 else None for name, v in found.items()}


def _refuse_output_in_source(settings: Settings, checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuse to write into what is read."""
    if settings.output is None:
        return
    target = settings.output.resolve()
    for name, source in (("checkpoint", checkpoint.path), ("base", base.folder)):
        folder = source.resolve()
        if folder.is_dir() and target.is_relative_to(folder):
            raise UsageError(
                where=f"--output {settings.output}",
                found=f"it lies in the {name}, {source}",
                expected="another folder",
                why="sources are never written to",
                fix="Pass another folder to --output",
            )


def _refuse_unknown(settings: Settings, tasks: Sequence[Task]) -> None:
    from mtl_export.checkpoint.checkpoint import task_named

    for name in settings.task:
        task_named(tuple(tasks), name)
