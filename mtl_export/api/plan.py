"""``mtl_export.plan``: what each way to deploy costs, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from mtl_export.api import dense, sources
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.errors import UsageError

if TYPE_CHECKING:
    from mtl_export.merge.plan import Plan


def plan(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    tasks: Sequence[str] = (),
    dtype: str | None = None,
    output: str | Path = "out",
    **source: Unpack[SourceOptions],
) -> Plan:
    """Return bytes, memory and time of merged models, graphs and engines; nothing is kept.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id.
        tasks: Names; none: all tasks.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None: the base's.
        output: Where exports would go: the disk that is measured.
        **source: What the checkpoint does not carry.

    Raises:
        TaskNotFoundError: A task is unknown.
        CheckpointError: The checkpoint is broken or unsupported; likewise ``BaseModelError``
            and ``AdapterError``.

    Example:
        >>> import mtl_export as mx
        >>> mx.plan("adapter", base="base").tasks
        3
    """
    return plan_of(
        replace(
            settings_of(checkpoint, base, source),
            task=tuple(tasks),
            dtype=dtype,
            output_dir=Path(output),
        )
    )


def plan_of(settings: Settings) -> Plan:
    """Return the costs of what ``settings`` name; see ``plan``."""
    from mtl_export.graph.parts import refusal_of
    from mtl_export.merge.plan import make_plan, measure_speeds

    place = settings.output or settings.output_dir
    swin = dense.opened(settings)
    if swin is not None:
        raise UsageError(
            f"plan: {swin.checkpoint.path} is a whole model",
            expected="an adapter on a base, whose merged copies may be large",
            fix="Run mtl-export merge or onnx: a task's folder is no larger than this file",
        )
    bound = sources.open_bound(settings, check_hash=False, targets=[place])
    tasks = bound.adapters.tasks
    if settings.task:
        tasks = sources.selected_tasks(settings, tasks)
    speeds = measure_speeds(bound, place)
    refusal = refusal_of(bound)
    refused = refusal.problem if refusal else ""
    return make_plan(bound, tasks, settings.dtype, speeds, refused)
