"""``mtl-export merge``: one standalone model folder per task, all in one pass over the base."""

from __future__ import annotations

import os
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import click

from mtl_export.api import sources
from mtl_export.api.settings import Settings
from mtl_export.api.written import WRITTEN, Written
from mtl_export.errors import UsageError
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.written import print_written

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import OptionValue, Recipe
    from mtl_export.bundle.merged import MergedTask
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.merge.writer import MergeOptions

EPILOG = """\b
Example:
  mtl-export merge --task ads_rel
  mtl-export merge --all-tasks --dtype fp16 -o models
  mtl-export merge --all-tasks --layout shared --report
"""
LAYOUTS = ("standalone", "shared")
# Variables of their own: MTL_EXPORT_LAYOUT is that of graphs and engines, MTL_EXPORT_REPORT
# the file that parity writes.
LAYOUT = click.option(
    "--layout", type=click.Choice(LAYOUTS), default="standalone", show_default=True,
    envvar="MTL_EXPORT_MERGE_LAYOUT", show_envvar=True,
    help="shared: store tensors that no task changes once for all tasks.",
)  # fmt: skip
REPORT = click.option(
    "--report", is_flag=True, envvar="MTL_EXPORT_MERGE_REPORT", show_envvar=True,
    help="Print how far each task moves each layer.",
)  # fmt: skip


@click.command(short_help="Fold tasks into standalone model folders.", epilog=EPILOG)
@with_settings(options.SOURCE, options.SELECTION, options.OUTPUT, options.TALK)
@LAYOUT
@option(
    "--shared-by", type=click.Choice(("link", "reference")), default="link", show_default=True,
    help="How folders get shared tensors: as hard links, or from _shared/ beside them.",
)  # fmt: skip
@option("--max-shard-size", metavar="SIZE", help="Cut weight files at this size, such as 5GB.")
@option("--resume", is_flag=True, help="Continue what a killed run of this command has begun.")
@option("--verify", is_flag=True, help="Read the result again and compare it with base + delta.")
@REPORT
def command(
    settings: Settings,
    *,
    layout: str,
    shared_by: str,
    max_shard_size: str | None,
    resume: bool,
    verify: bool,
    report: bool,
) -> None:
    """Fold tasks into standalone model folders.

    Each folder is a plain model in safetensors that from_pretrained loads, with no
    adapter left in it: merged/TASK under the output folder, or --output/TASK. The base
    is read once, however many tasks there are.
    """
    # One thread a core folds already; OpenBLAS reads this when numpy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from mtl_export.bundle.merged import MergeRequest, merge_tasks
    from mtl_export.merge.head_file import head_note
    from mtl_export.merge.layout import parse_size
    from mtl_export.merge.writer import MergeOptions

    started = perf_counter()
    if shared_by == "reference" and layout != "shared" and options.is_typed("shared_by"):
        raise UsageError(
            where="--shared-by reference",
            found=f"--layout {layout}",
            expected="--layout shared beside it",
            why="standalone folders share nothing",
            fix="Add --layout shared, or leave out --shared-by",
        )
    bound = sources.open_bound(settings, check_hash=False, targets=[settings.folder("merged")])
    tasks = sources.selected_tasks(settings, bound.adapters.tasks)
    merge_options = MergeOptions(
        dtype=settings.dtype,
        layout="shared" if layout == "shared" else "standalone",
        max_shard_bytes=parse_size(max_shard_size) if max_shard_size else None,
        is_linked=shared_by == "link",
    )
    request = MergeRequest(
        bound=bound,
        tasks=tasks,
        parent=settings.folder("merged"),
        options=merge_options,
        recipe=_recipe(bound, tasks, merge_options),
        force=settings.force,
        resume=resume,
        verify=verify,
    )
    talk = render.Talk.from_settings(settings)
    with talk.steps(1) as steps:
        steps.begin(f"merge: {', '.join(task.name for task in tasks)}")
        merged = merge_tasks(request, steps.within)
    for note in dict.fromkeys(filter(None, (head_note(bound, task) for task in tasks))):
        talk.note(note)
    _warn(talk, merged)
    if any(one.is_restored for one in merged):
        talk.note("what the tasks share was lost or changed in _shared/, and is written again")
    _print(settings, merged, perf_counter() - started, report=report)


def _recipe(
    bound: BoundModel, tasks: Sequence[Task], merge_options: MergeOptions
) -> Callable[[str], Recipe]:
    """Return the function that makes a folder's recipe; it asks for the base's hash."""

    def recipe(name: str) -> Recipe:
        own: dict[str, OptionValue] = {"task": name, "dtype": merge_options.dtype}
        if merge_options.max_shard_bytes is not None:
            own["max_shard_bytes"] = merge_options.max_shard_bytes
        if merge_options.layout == "shared":
            # What is shared depends on all of them.
            own["layout"] = "shared"
            own["shared_by"] = "link" if merge_options.is_linked else "reference"
            own["shared_with"] = [task.name for task in tasks]
            if not merge_options.is_linked:
                own["shared_in"] = "_shared/<id>"  # earlier versions: _shared itself
        return sources.recipe("merge", bound, own)

    return recipe


def _warn(talk: render.Talk, merged: Sequence[MergedTask]) -> None:
    for drift in (one.drift for one in merged if one.drift is not None):
        if drift.loses_much:
            talk.note(
                f"{drift.task}: {drift.dtype} loses {drift.total.lost:.0%} of what the task"
                " changes; --dtype fp32 keeps it, and so does one routed graph"
                " (mtl-export onnx), where the adapter stays apart"
            )


def _written(one: MergedTask, seconds: float) -> Written:
    written = Written.from_plan(one.plan, [one.task.name], seconds)
    return replace(written, status=WRITTEN) if one.is_restored else written


def _print(
    settings: Settings, merged: Sequence[MergedTask], seconds: float, *, report: bool
) -> None:
    written = [_written(one, seconds) for one in merged]
    if settings.json:
        reports = [{k: v for k, v in one.report.items() if k != "head"} for one in merged]
        more: dict[str, object] = {"drift": reports}
        verified = {one.task.name: one.verified_count for one in merged if one.verified_count}
        more |= {"verified": verified} if verified else {}
        print_written("merge", written, as_json=True, more=more)
        return
    print_written("merge", written, as_json=False)
    if report:
        _print_report(merged)
    for one in merged:
        if one.verified_count:
            render.print_line(f"{one.task.name}: {one.verified_count:,} elements verified")


def _print_report(merged: Sequence[MergedTask]) -> None:
    columns = ("task", "layer", "drift", "lost", "output error")

    def row(task: str, layer: str, figures: Mapping[str, float]) -> tuple[str, ...]:
        shown = (figures["drift"], figures["lost"], figures["output_error"])
        return (task, layer, *(f"{figure:.2%}" for figure in shown))

    rows = [row(one.task.name, "all", one.report) for one in merged]
    rows += [
        row(one.task.name, module, figures)
        for one in merged
        for module, figures in one.report["layers"].items()
    ]
    title = "drift ||D||/||W||, lost to rounding ||R||/||D||, output error ||R||/||W+D||"
    render.print_table(columns, rows, title=title, right=columns[2:])
