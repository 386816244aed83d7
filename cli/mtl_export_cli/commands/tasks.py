"""``mtl-export tasks``: add, remove or rename a task of an exported graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.settings import Settings
from mtl_export.api.written import UP_TO_DATE, WRITTEN
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.adapters.normal_form import AdapterSet
    from mtl_export.bundle.edited import Edited
    from mtl_export.checkpoint.checkpoint import Checkpoint, Task

EPILOG = """\b
Example:
  mtl-export tasks add out/onnx toxic --checkpoint adapter-toxic
  mtl-export tasks remove out/onnx spam
  mtl-export tasks rename out/onnx spam junk
"""
# Without the settings file: it speaks of the checkpoint that the graph was made from.
SOURCE = options.SOURCE[:-1]
GRAPH = click.argument("graph", type=click.Path(path_type=Path), metavar="GRAPH")


@click.group(short_help="Add, remove or rename a task of a single graph.", epilog=EPILOG)
def command() -> None:
    """Add, remove or rename a task of a single graph.

    GRAPH is the folder of mtl-export onnx --all-tasks, or a graph in it. Nothing is traced;
    the other tasks' rows stay what they are, bit by bit, and so does what parity found of
    them. All graphs of the folder change together. Engines built before do not follow;
    mtl-export trt builds from the edited graph as it lies, mtl-export onnx never writes over
    it, and mtl-export calibrate takes per-task graphs beside it.

    mtl-export parity judges the tasks of its checkpoint under whatever id or name they have
    now, and names the others; mtl-export parity --checkpoint with theirs judges those.
    """


@command.command("add", short_help="Append a task of another checkpoint.")
@GRAPH
@click.argument("name")
@with_settings(SOURCE, options.TALK)
@option(
    "--from", "from_name", metavar="NAME",
    help="Its name in that checkpoint; by default NAME, or the checkpoint's only task.",
)  # fmt: skip
def add(settings: Settings, graph: Path, name: str, from_name: str | None) -> None:
    """Append a task of another checkpoint to GRAPH, called NAME.

    Its id is the number of tasks before. The checkpoint must share with the graph what its
    tasks share: the base, and every projection number for number.
    """
    from mtl_export.api import sources
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.graph.task_edit import add_task

    checkpoint = sources.open_settings_checkpoint(settings)
    source = _source(checkpoint.tasks, name, from_name)
    adapters, base_sha256 = _adapters(settings, checkpoint)
    of = f" of {source.name}" if source.name != name else ""
    note = f"add {name}{of} from {adapters.checkpoint_sha256}"
    edited = edit_folder(
        graph,
        lambda models: add_task(models, adapters, source, name, base_sha256),
        note,
        added=name,
    )
    _print(settings, "add", edited)


@command.command("remove", short_help="Cut a task out.")
@GRAPH
@click.argument("name")
@with_settings(options.TALK)
def remove(settings: Settings, graph: Path, name: str) -> None:
    """Cut task NAME out of GRAPH.

    Ids of later tasks go down by one, as the table says; logits keep their width.
    """
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.graph.task_edit import remove_task

    edited = edit_folder(
        graph, lambda models: remove_task(models, name), f"remove {name}", removed=name
    )
    _print(settings, "remove", edited)


@command.command("rename", short_help="Give a task another name.")
@GRAPH
@click.argument("old")
@click.argument("new")
@with_settings(options.TALK)
def rename(settings: Settings, graph: Path, old: str, new: str) -> None:
    """Call task OLD of GRAPH NEW from now on; its id stays."""
    from mtl_export.bundle.edited import edit_folder
    from mtl_export.graph.task_edit import rename_task

    edited = edit_folder(
        graph,
        lambda models: rename_task(models, old, new),
        f"rename {old} {new}",
        renamed=(old, new),
    )
    _print(settings, "rename", edited)


def _adapters(settings: Settings, checkpoint: Checkpoint) -> tuple[AdapterSet, str]:
    """Return the new checkpoint in normal form, and its base's hash as far as it is known.

    It is bound to its base, if that is given; else the checkpoint may name it.
    """
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.api import sources

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


def _print(settings: Settings, verb: str, edited: Edited) -> None:
    before = {task.name: task.index for task in edited.before}
    by_index = {task.index: task.name for task in edited.before}
    rows = []
    for task in edited.after:
        old = before.get(task.name)
        if old is None and verb == "rename":
            status, old = f"was {by_index[task.index]}", task.index
        elif old is None:
            status = "added"
        else:
            status = "as before" if old == task.index else f"id was {old}"
        rows.append((task, status))
    if settings.json:
        listed = [
            {
                "name": task.name, "index": task.index, "labels": list(task.labels),
                "kind": task.kind, "status": status,
                "verified": task.name not in edited.unverified,
            }
            for task, status in rows
        ]  # fmt: skip
        status = UP_TO_DATE if edited.up_to_date else WRITTEN
        document = {"path": str(edited.folder), "status": status, "tasks": listed}
        render.print_json({"ok": True, "command": f"tasks {verb}", **document})
        return
    render.print_table(
        ("id", "task", "labels", "now"),
        [(str(t.index), t.name, str(len(t.labels)), status) for t, status in rows],
        right=("id", "labels"),
    )
    if edited.up_to_date:
        render.print_line(f"{edited.folder}: {UP_TO_DATE}")
    if edited.unverified:
        names = ", ".join(edited.unverified)
        render.print_line(f"not compared with PyTorch yet: {names}")
