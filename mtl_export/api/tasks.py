"""``mtl_export.add_task``, ``remove_task``, ``rename_task``: edits of an exported single graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from mtl_export.api import sources
from mtl_export.api.settings import Settings, SourceOptions, settings_of
from mtl_export.errors import UsageError

if TYPE_CHECKING:
    from mtl_export.adapters.normal_form import AdapterSet
    from mtl_export.bundle.edited import Edited
    from mtl_export.checkpoint.checkpoint import Checkpoint, Task


def add_task(
    graph: str | Path,
    name: str,
    *,
    checkpoint: str | Path,
    base: str | Path | None = None,
    from_name: str | None = None,
    **source: Unpack[SourceOptions],
) -> Edited:
    """Append a task of another checkpoint to the single graph in the folder ``graph``.

    Args:
        graph: What ``export_onnx`` wrote.
        name: What the task is called from now on; its id is the number of tasks before.
        checkpoint: Shares the base and every projection with the graph, number for number.
        base: Its base; None: what the checkpoint says of it must do.
        from_name: The task's name there; None: ``name``, or the checkpoint's only task.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: Another task has the name, or the checkpoint does not share the projections.
        TaskNotFoundError: The checkpoint has no such task.
        IntegrityError: The folder is damaged, or trained on another base.

    Example:
        >>> import mtl_export as mx
        >>> edited = mx.add_task("out/onnx", "spam_2", checkpoint="adapter", from_name="spam")
        >>> edited.after[-1].name
        'spam_2'
    """
    return add_requested(Path(graph), name, settings_of(checkpoint, base, source), from_name)


def remove_task(graph: str | Path, name: str) -> Edited:
    """Cut a task out of the single graph in the folder ``graph``; ids after it go down by one.

    Args:
        graph: What ``export_onnx`` wrote.
        name: The task.

    Raises:
        TaskNotFoundError: The graph has no such task, and no edit removed it last.
        IntegrityError: The folder is damaged.

    Example:
        >>> import mtl_export as mx
        >>> [task.name for task in mx.remove_task("out/onnx", "spam").after]
        ['ads_rel', 'topic']
    """
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.dense import edit as dense_edit
    from mtl_export.graph import task_edit

    if dense_edit.is_dense(Path(graph)):
        return dense_edit.remove_output(Path(graph), name)
    return edit_folder(
        Path(graph),
        lambda models: task_edit.remove_task(models, name),
        f"remove {name}",
        removed=name,
    )


def rename_task(graph: str | Path, old: str, new: str) -> Edited:
    """Call a task of the single graph in the folder ``graph`` by another name; its id stays.

    Args:
        graph: What ``export_onnx`` wrote.
        old: The task.
        new: Its new name.

    Raises:
        TaskNotFoundError: The graph has no such task, and no edit renamed it last.
        UsageError: ``new`` is no name of a task, or another's.
        IntegrityError: The folder is damaged.

    Example:
        >>> import mtl_export as mx
        >>> mx.rename_task("out/onnx", "spam", "junk").after[2].name
        'junk'
    """
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.graph import task_edit

    _refuse_dense(Path(graph), "rename")
    return edit_folder(
        Path(graph),
        lambda models: task_edit.rename_task(models, old, new),
        f"rename {old} {new}",
        renamed=(old, new),
    )


def add_requested(graph: Path, name: str, settings: Settings, from_name: str | None) -> Edited:
    """Append the task that ``settings`` and ``from_name`` name; see ``add_task``."""
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.graph import task_edit

    _refuse_dense(graph, "add")
    checkpoint = sources.open_settings_checkpoint(settings)
    source = _source(checkpoint.tasks, name, from_name)
    adapters, base_sha256 = _adapters(settings, checkpoint)
    of = f" of {source.name}" if source.name != name else ""
    return edit_folder(
        graph,
        lambda models: task_edit.add_task(models, adapters, source, name, base_sha256),
        f"add {name}{of} from {adapters.checkpoint_sha256}",
        added=name,
    )


def _refuse_dense(graph: Path, verb: str) -> None:
    """Refuse an edit that a graph of dense tasks cannot have.

    Raises:
        UsageError: It is such a graph.
    """
    from mtl_export.dense.edit import is_dense

    if is_dense(graph):
        raise UsageError(
            f"tasks {verb}: {graph} answers images",
            expected="a graph of texts; of this one tasks can only be removed",
            fix="Export the checkpoint that has the tasks you want: mtl-export onnx --all-tasks",
        )


def _adapters(settings: Settings, checkpoint: Checkpoint) -> tuple[AdapterSet, str]:
    """Return the new checkpoint in normal form, and its base's hash as far as it is known.

    It is bound to its base, if that is given; else the checkpoint may name it.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters

    if settings.base is None:
        return read_adapters(checkpoint), checkpoint.base.sha256
    base = sources.open_settings_base(settings, checkpoint)
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    return bound.adapters, bound.base.sha256


def _source(tasks: tuple[Task, ...], name: str, from_name: str | None) -> Task:
    from mtl_export.checkpoint.checkpoint import task_named

    known = {task.name for task in tasks}
    if from_name is None and name not in known and len(tasks) == 1:
        return tasks[0]
    return task_named(tasks, from_name or name, option="--from")
