"""``mtl-export merge``: one standalone model folder per task."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import click

from mtl_export_cli import options, render, sources
from mtl_export_cli.options import Settings, with_settings
from mtl_export_cli.written import Written, print_written

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.checkpoint import Task

EPILOG = """\b
Example:
  mtl-export merge --task ads_rel
  mtl-export merge --all-tasks --dtype fp16 -o models
"""


@click.command(short_help="Fold tasks into standalone model folders.", epilog=EPILOG)
@with_settings(options.SOURCE, options.SELECTION, options.OUTPUT, options.TALK)
def command(settings: Settings) -> None:
    """Fold tasks into standalone model folders.

    Each folder is a plain model in safetensors that from_pretrained loads, with no
    adapter left in it: merged/TASK under the output folder, or --output/TASK.
    """
    bound = sources.open_bound(settings)
    tasks = sources.selected_tasks(settings, bound.adapters.tasks)
    with render.Talk.from_settings(settings).steps(len(tasks)) as steps:
        written = [_merge(settings, bound, task, steps) for task in tasks]
    print_written("merge", written, as_json=settings.json)


def _merge(settings: Settings, bound: BoundModel, task: Task, steps: render.Steps) -> Written:
    from mtl_export.bundle.output import output_folder
    from mtl_export.merge.writer import merged_size_bytes, write_merged

    steps.begin(f"merge: {task.name}")
    started = perf_counter()
    with output_folder(
        settings.folder("merged") / task.name,
        recipe=sources.recipe("merge", bound, {"task": task.name, "dtype": settings.dtype}),
        force=settings.force,
        estimated_size_bytes=merged_size_bytes(bound, settings.dtype),
    ) as plan:
        if not plan.up_to_date:
            write_merged(bound, task, plan.folder, dtype=settings.dtype, progress=steps.within)
    return Written.from_plan(plan, [task.name], perf_counter() - started)
