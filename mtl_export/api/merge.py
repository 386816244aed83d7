"""``mtl_export.merge``: fold tasks into standalone model folders, in one pass over the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

from typing_extensions import Unpack

from mtl_export.api import dense, sources
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.api.written import WRITTEN, Written
from mtl_export.errors import UsageError

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import OptionValue, Recipe
    from mtl_export.bundle.merged import MergedTask
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.merge.writer import MergeOptions

Layout = Literal["standalone", "shared"]
SharedBy = Literal["link", "reference"]


@dataclass(frozen=True, slots=True)
class Merged:
    """The folders of one merge.

    Attributes:
        outputs: One per task, in id order.
        tasks: What was measured of each: drift, report, elements verified.
    """

    outputs: tuple[Written, ...]
    tasks: tuple[MergedTask, ...]


@dataclass(frozen=True, slots=True)
class MergeChoices:
    """How merged folders are written.

    Attributes:
        layout: ``shared`` stores tensors that no task changes once.
        shared_by: How folders get these: hard links, or a reference to ``_shared/``; None: links.
        max_shard_size: Cut weight files at this size, such as ``5GB``; None: at the base's.
        resume: Continue what a killed run has begun.
        verify: Read the result again and compare it with base + delta.
    """

    layout: Layout = "standalone"
    shared_by: SharedBy | None = None
    max_shard_size: str | None = None
    resume: bool = False
    verify: bool = False


def merge(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    output: str | Path,
    tasks: Sequence[str] = (),
    dtype: str | None = None,
    layout: Layout = "standalone",
    shared_by: SharedBy | None = None,
    max_shard_size: str | None = None,
    resume: bool = False,
    verify: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> Merged:
    """Fold tasks into standalone model folders, ``output/TASK``, that from_pretrained loads.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        output: Parent of the folders.
        tasks: Names; none: all tasks.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None: the base's.
        layout: ``shared`` stores tensors that no task changes once.
        shared_by: With ``shared``: hard ``link`` (None), or ``reference`` to ``_shared/``.
        max_shard_size: Cut weight files at this size, such as ``5GB``.
        resume: Continue what a killed run has begun.
        verify: Read the result again and compare it with base + delta.
        force: Replace old results that are different.
        progress: Hears how much is written, and what the user should know.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: An option would be ignored.
        TaskNotFoundError: A task is unknown.
        CheckpointError: The checkpoint is broken or unsupported; likewise ``BaseModelError``
            and ``AdapterError``.
        OutputError: A folder exists and differs, or cannot be written.
        IntegrityError: The base is not the one trained on, or ``verify`` found a difference.

    Example:
        >>> import mtl_export as mx
        >>> found = mx.merge("adapter", base="base", tasks=["spam"], output="models")
        >>> [(str(one.path), one.status) for one in found.outputs]
        [('models/spam', 'written')]
    """
    settings = replace(
        settings_of(checkpoint, base, source),
        task=tuple(tasks),
        all_tasks=not tasks,
        dtype=dtype,
        output=Path(output),
        force=force,
    )
    choices = MergeChoices(layout, shared_by, max_shard_size, resume, verify)
    return merge_requested(settings, choices, progress)


def merge_requested(settings: Settings, choices: MergeChoices, progress: Progress) -> Merged:
    """Fold the tasks that ``settings`` name; see ``merge``."""
    swin = dense.opened(settings)
    if swin is not None:
        _refuse_for_dense(choices)
        return Merged(dense.merge(swin, settings, progress), ())
    # One thread a core folds already; OpenBLAS reads this when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mtl_export.bundle.merged import MergeRequest, merge_tasks
    from mtl_export.merge.layout import parse_size
    from mtl_export.merge.writer import MergeOptions

    started = perf_counter()
    if choices.shared_by is not None and choices.layout != "shared":
        raise UsageError(
            f"--shared-by {choices.shared_by}: --layout {choices.layout}",
            expected="--layout shared beside it, because standalone folders share nothing",
            fix="Add --layout shared, or leave out --shared-by",
        )
    bound = sources.open_bound(settings, check_hash=False, targets=[settings.folder("merged")])
    tasks = sources.selected_tasks(settings, bound.adapters.tasks)
    options = MergeOptions(
        dtype=settings.dtype,
        layout=choices.layout,
        max_shard_bytes=parse_size(choices.max_shard_size) if choices.max_shard_size else None,
        is_linked=choices.shared_by != "reference",
    )
    request = MergeRequest(
        bound=bound,
        tasks=tasks,
        parent=settings.folder("merged"),
        options=options,
        recipe=_recipe(bound, tasks, options),
        force=settings.force,
        resume=choices.resume,
        verify=choices.verify,
    )
    progress.expect(1)
    progress.begin(f"merge: {', '.join(task.name for task in tasks)}")
    merged = merge_tasks(request, progress.within)
    for note in _notes(bound, tasks, merged):
        progress.note(note)
    seconds = perf_counter() - started
    return Merged(tuple(_written(one, seconds) for one in merged), tuple(merged))


def _refuse_for_dense(choices: MergeChoices) -> None:
    """Refuse what says nothing about folders of dense tasks.

    Raises:
        UsageError: It was asked for.
    """
    words = {
        "--layout shared": choices.layout == "shared",
        "--max-shard-size": choices.max_shard_size is not None,
        "--resume": choices.resume,
        "--verify": choices.verify,
    }
    for word in (word for word, is_given in words.items() if is_given):
        raise UsageError(
            f"{word}: a model of dense tasks beside it",
            expected=f"no {word}, because each task gets one small folder, written at once",
            fix=f"Leave out {word}; mtl-export parity compares the folder with PyTorch",
        )


def _notes(bound: BoundModel, tasks: Sequence[Task], merged: Sequence[MergedTask]) -> list[str]:
    """Return what the user should know of the result."""
    from mtl_export.merge.head_file import head_note

    notes = list(dict.fromkeys(filter(None, (head_note(bound, task) for task in tasks))))
    for drift in (one.drift for one in merged if one.drift is not None):
        if drift.loses_much:
            notes.append(
                f"{drift.task}: {drift.dtype} loses {drift.total.lost:.0%} of what the task"
                " changes; --dtype fp32 keeps it, and so does one routed graph"
                " (mtl-export onnx), where the adapter stays apart"
            )
    if any(one.is_restored for one in merged):
        notes.append("what the tasks share was lost or changed in _shared/, and is written again")
    return notes


def _recipe(
    bound: BoundModel, tasks: Sequence[Task], options: MergeOptions
) -> Callable[[str], Recipe]:
    """Return the function that makes a folder's recipe; it asks for the base's hash."""

    def recipe(name: str) -> Recipe:
        own: dict[str, OptionValue] = {"task": name, "dtype": options.dtype}
        if options.max_shard_bytes is not None:
            own["max_shard_bytes"] = options.max_shard_bytes
        if options.layout == "shared":
            # What is shared depends on all of them.
            own["layout"] = "shared"
            own["shared_by"] = "link" if options.is_linked else "reference"
            own["shared_with"] = [task.name for task in tasks]
            if not options.is_linked:
                own["shared_in"] = "_shared/<id>"  # earlier versions: _shared itself
        return sources.recipe("merge", bound, own)

    return recipe


def _written(one: MergedTask, seconds: float) -> Written:
    written = Written.from_plan(one.plan, [one.task.name], seconds)
    return replace(written, status=WRITTEN) if one.is_restored else written
