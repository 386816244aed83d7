"""``mtl-export trt``: TensorRT engines from the graphs of ``onnx`` or of ``calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mtl_export.api import engines
from mtl_export.api.engine_shapes import ShapeTexts
from mtl_export.api.engines import EngineRequest, Failed
from mtl_export.api.graph_form import Form
from mtl_export.api.settings import Settings
from mtl_export.api.trt import EngineBuild, build_requested
from mtl_export.errors import BackendError, UsageError
from mtl_export.names import QUANTISED_DTYPES
from mtl_export_cli import options, render
from mtl_export_cli.engine_options import ENGINE, with_engine_choices
from mtl_export_cli.graph_form import with_form
from mtl_export_cli.options import option, with_settings

if TYPE_CHECKING:
    from mtl_export.tensorrt.options import BuildOptions

EPILOG = """\b
Example:
  mtl-export trt --all-tasks
  mtl-export trt --all-tasks --layout both --jobs 2
  mtl-export trt --all-tasks --quantize int8
  mtl-export trt --task ads_rel --max-shapes input_ids:64x128
"""
# What trtexec users type -> what holds instead. TensorRT 11 and TensorRT-RTX have none of them.
GONE = {
    "--fp16": "Pass --dtype fp16: the graph is exported in it, and the engine computes in it",
    "--int8": "Run mtl-export calibrate --quantize int8, then mtl-export trt --quantize int8",
    "--best": "Leave it out: an engine computes in the precision of its graph",
    "--calib": "Run mtl-export calibrate: scales live in the graph, as explicit Q/DQ nodes",
}


def _gone(context: click.Context, parameter: click.Parameter, value: object) -> None:
    name = parameter.opts[0]
    if value:
        raise UsageError(
            f"{name}: TensorRT has no such switch any more",
            expected=(
                "precision to be written in the graph, because networks are strongly typed since "
                "TensorRT 11, and calibrators are gone"
            ),
            fix=GONE[name],
        )


HIDDEN = tuple(
    click.option(
        name, hidden=True, expose_value=False, callback=_gone,
        **({"metavar": "FILE"} if name == "--calib" else {"is_flag": True}),
    )
    for name in GONE
)  # fmt: skip
JOB = (
    option("--layout", type=click.Choice(engines.ENGINE_LAYOUTS), help=options.LAYOUT_HELP),
    option("--quantize", type=click.Choice(QUANTISED_DTYPES), help=options.QUANTIZE_HELP),
    option(
        "--jobs", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Engines to build at a time; each takes up to three times its weights of memory."
        " Leave it at 1 with TensorRT, which times kernels on the GPU.",
    ),
)  # fmt: skip


@click.command(short_help="Build TensorRT engines.", epilog=EPILOG)
@with_settings(
    options.SOURCE,
    options.SELECTION,
    JOB,
    options.FORM,
    ENGINE,
    options.OUTPUT,
    options.TALK,
    HIDDEN,
)
@with_engine_choices
@with_form
def command(
    settings: Settings,
    *,
    layout: str | None,
    quantize: str | None,
    jobs: int,
    form: Form,
    choices: BuildOptions,
    shapes: tuple[ShapeTexts, ...],
) -> int:
    """Build TensorRT engines.

    With tensorrt and a GPU, for that GPU; else with tensorrt_rtx, which builds without
    one. The ONNX graphs are taken from onnx/ under the output folder, and exported there
    first where they are missing; a single graph whose tasks were edited (mtl-export tasks) is
    taken as it lies; with --quantize int8 they are those that mtl-export
    calibrate wrote to onnx-int8/. Engines go to engines/ (engines-int8/), or to --output,
    each with a manifest that says what was checked and what could not be. The largest is
    built first. A run that was killed is taken up where it was; where one engine fails the
    others are built all the same, and the exit code is 6.
    """
    request = EngineRequest(choices, layout, quantize, jobs, form, shapes)
    with render.Messages.from_settings(settings).steps() as steps:
        found = build_requested(settings, request, steps)
    _print(settings, found)
    return _exit_code(found.failed)


def _exit_code(failed: Sequence[Failed]) -> int:
    """Return 0, the code that all failures share, or that of a builder's refusal."""
    from mtl_export_cli.main import EXIT_CODES, exit_code

    codes = {exit_code(one.error) for one in failed}
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else EXIT_CODES[BackendError]


def _print(settings: Settings, found: EngineBuild) -> None:
    built, failed = found.built, found.failed
    if settings.json:
        document: dict[str, object] = {"ok": not failed, "command": "trt"}
        if failed:
            document |= {"error": failed[0].error.as_dict(), "exit_code": _exit_code(failed)}
        document["outputs"] = [one.as_dict() for one in built]
        document["failures"] = [one.as_dict() for one in failed]
        render.print_json({**document, "onnx": [output.as_dict() for output in found.exported]})
        return
    rows = [
        (
            one.artefact,
            f"{one.manifests[0].builder} {one.manifests[0].builder_version}",
            render.size_text(one.size_bytes),
            f"{one.output.seconds:.1f}",
            ", ".join(one.output.tasks),
            one.output.status,
            one.run_check.verdict,
        )
        for one in built
    ]
    rows += [(str(one.path), "-", "-", "-", ", ".join(one.tasks), "failed", "-") for one in failed]
    columns = ("artefact", "builder", "size", "seconds", "tasks", "status", "run here")
    render.print_table(columns, rows, right=("size", "seconds"))
    for reason in dict.fromkeys(one.run_check.reason for one in built if one.run_check.reason):
        render.print_line(f"not run here: {reason}")
    for one in failed:
        render.print_error(f"{one.name}: {one.error}")
