"""``mtl-export onnx``: one graph for all tasks, or one per task, from one trace."""

from __future__ import annotations

import click

from mtl_export_cli import graphs, options, render, sources
from mtl_export_cli.options import Settings, with_settings
from mtl_export_cli.written import print_written

EPILOG = """\b
Example:
  mtl-export onnx --all-tasks
  mtl-export onnx --all-tasks --layout per-task
  mtl-export onnx --task ads_rel
"""


@click.command(short_help="Export one routed graph, or one per task.", epilog=EPILOG)
@with_settings(options.SOURCE, options.SELECTION, [options.LAYOUT], options.OUTPUT, options.TALK)
def command(settings: Settings, layout: str | None) -> None:
    """Export one routed graph, or one per task.

    single-graph: one model.onnx with the extra input task_ids (int64 [batch]); every row
    picks its own task. per-task: TASK/model.onnx, that task's weights merged in. Both go
    to onnx/ under the output folder, or to --output. The base is traced once.
    """
    graphs.refuse_dtype(settings)
    bound = sources.open_bound(settings)
    wanted = graphs.wanted_graphs(settings, layout, bound.adapters.tasks)
    exporter = graphs.Exporter(bound, settings.folder("onnx"))
    with render.Talk.from_settings(settings).steps(len(wanted)) as steps:
        written = [exporter.write(graph, steps, force=settings.force) for graph in wanted]
    print_written("onnx", written, as_json=settings.json)
