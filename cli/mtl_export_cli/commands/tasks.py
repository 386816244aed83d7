"""``mtl-export tasks``: add, remove or rename a task of an exported graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.settings import Settings
from mtl_export.api.tasks import add_requested, remove_task, rename_task
from mtl_export.api.written import UP_TO_DATE, WRITTEN
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.bundle.edited import Edited

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
    edited = add_requested(graph, name, settings, from_name)
    _print(settings, "add", edited)


@command.command("remove", short_help="Cut a task out.")
@GRAPH
@click.argument("name")
@with_settings(options.TALK)
def remove(settings: Settings, graph: Path, name: str) -> None:
    """Cut task NAME out of GRAPH.

    Ids of later tasks go down by one, as the table says; logits keep their width.
    """
    _print(settings, "remove", remove_task(graph, name))


@command.command("rename", short_help="Give a task another name.")
@GRAPH
@click.argument("old")
@click.argument("new")
@with_settings(options.TALK)
def rename(settings: Settings, graph: Path, old: str, new: str) -> None:
    """Call task OLD of GRAPH NEW from now on; its id stays."""
    _print(settings, "rename", rename_task(graph, old, new))


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
