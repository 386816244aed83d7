"""``mtl-export onnx``: one graph for all tasks, or one per task, from one trace."""

from __future__ import annotations

import click

from mtl_export.api import graphs
from mtl_export.api.graph_form import Form
from mtl_export.api.onnx import export_requested
from mtl_export.api.settings import Settings
from mtl_export.names import ADAPTER_INPUT, LAYOUTS, PER_TASK
from mtl_export_cli import options, render
from mtl_export_cli.graph_form import with_form
from mtl_export_cli.options import option, with_settings
from mtl_export_cli.written import print_written

EPILOG = """\b
Example:
  mtl-export onnx --all-tasks
  mtl-export onnx --all-tasks --layout per-task
  mtl-export onnx --all-tasks --layout adapter-input
  mtl-export onnx --task ads_rel
"""
# One layout more than engines and calibration have.
LAYOUT = option(
    "--layout", type=click.Choice((*LAYOUTS, ADAPTER_INPUT)),
    help=options.LAYOUT_HELP,
)  # fmt: skip


@click.command(short_help="Export one routed graph, or one per task.", epilog=EPILOG)
@with_settings(
    options.SOURCE,
    options.SELECTION,
    [LAYOUT],
    options.FORM,
    options.OUTPUT,
    options.TALK,
)
@option(
    "--link-data", is_flag=True,
    help="per-task: hard-link what the tasks have in common. Only ONNX Runtime opens such folders.",
)  # fmt: skip
@option(
    "--postprocess", is_flag=True,
    help="Of dense tasks: put argmax, sigmoid or normalisation into the graph.",
)  # fmt: skip
@with_form
def command(
    settings: Settings,
    layout: str | None,
    *,
    form: Form,
    link_data: bool,
    postprocess: bool,
) -> None:
    """Export one routed graph, or one per task.

    single-graph: one model.onnx with the extra input task_ids (int64 [batch]); every row
    picks its own task. per-task: TASK/model.onnx, that task's weights merged in; what all
    tasks have in common lies in shared.onnx.data, the same file in every folder.
    adapter-input: adapter-input/model.onnx, the base, and one TASK.onnx_adapter a task, which
    ONNX Runtime is told for each run (RunOptions.add_active_adapter). All go to onnx/ under
    the output folder, or to --output. The base is traced once.

    --dtype fp16 or bf16: weights and activations are of that type, statistics, softmax and
    positions float32; results are given as float32. Without it graphs are fp32. --inline: the
    single graph has stock nodes only, for tools and runtimes that know no functions.
    """
    is_per_task = graphs.layout_or_default(settings, layout) == PER_TASK
    linked = link_data and (is_per_task or "link_data" in settings.typed)
    with render.Messages.from_settings(settings).steps() as steps:
        written = export_requested(
            settings, layout, form, steps, link_data=linked, postprocess=postprocess
        )
    print_written("onnx", written, as_json=settings.json)
