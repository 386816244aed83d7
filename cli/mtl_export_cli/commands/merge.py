"""``mtl-export merge``: one standalone model folder per task, all in one pass over the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mtl_export.api.merge import Layout, MergeChoices, Merged, SharedBy, merge_requested
from mtl_export.api.settings import Settings
from mtl_export_cli import options, render
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.written import print_written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mtl_export.bundle.merged import MergedTask

EPILOG = """\b
Example:
  mtl-export merge --task ads_rel
  mtl-export merge --all-tasks --dtype fp16 -o models
  mtl-export merge --all-tasks --layout shared --report
"""
# Variables of their own: MTL_EXPORT_LAYOUT is that of graphs and engines, MTL_EXPORT_REPORT
# the file that parity writes.
LAYOUT = click.option(
    "--layout", type=click.Choice(("standalone", "shared")), default="standalone",
    show_default=True, envvar="MTL_EXPORT_MERGE_LAYOUT", show_envvar=True,
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
    layout: Layout,
    shared_by: SharedBy,
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
    # Links are what folders get anyway; a settings file may mean other merges.
    is_meant = shared_by == "reference" and (layout == "shared" or options.is_typed("shared_by"))
    choices = MergeChoices(
        layout, "reference" if is_meant else None, max_shard_size, resume, verify
    )
    with render.Messages.from_settings(settings).steps() as steps:
        merged = merge_requested(settings, choices, steps)
    _print(settings, merged, report=report)


def _print(settings: Settings, result: Merged, *, report: bool) -> None:
    merged, written = result.tasks, result.outputs
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
