"""``mtl_export.build_engines``: TensorRT engines from exported or calibrated graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api import dense, engines, graphs, sources
from mtl_export.api.engine_shapes import ShapeTexts
from mtl_export.api.engines import Built, EngineJob, EngineRequest, Failed
from mtl_export.api.graph_form import Form, form_of
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import (
    TASK_INPUTS,
    Settings,
    SourceOptions,
    refuse_unknown_values,
    settings_of,
)
from mtl_export.api.written import Written
from mtl_export.checkpoint.sentence_embedding import POOLINGS
from mtl_export.errors import UsageError
from mtl_export.graph.names import NEWEST_OPSET, OLDEST_OPSET, OPSET
from mtl_export.names import DTYPES, QUANTISED_DTYPES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mtl_export.checkpoint.sentence_embedding import Pooling
    from mtl_export.dense.model import DenseModel
    from mtl_export.graph.passes.routing import TaskInput
    from mtl_export.tensorrt.available import BuilderInfo
    from mtl_export.tensorrt.options import BuildOptions


# What the plain values of ``build_engines`` may be.
KNOWN = {
    "layout": engines.ENGINE_LAYOUTS,
    "quantize": QUANTISED_DTYPES,
    "dtype": DTYPES,
    "task_input": TASK_INPUTS,
    "pooling": POOLINGS,
    "opset": range(OLDEST_OPSET, NEWEST_OPSET + 1),
}


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """What became of every engine.

    Attributes:
        exported: The graphs, where they were not there or were checked again.
        built: The folders of engines.
        failed: Those that there are not, and why.
    """

    exported: tuple[Written, ...]
    built: tuple[Built, ...]
    failed: tuple[Failed, ...]

    @property
    def passed(self) -> bool:
        """Return whether every engine is there."""
        return not self.failed


def build_engines(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    tasks: Sequence[str] = (),
    layout: str | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
    output: str | Path | None = None,
    output_dir: str | Path = "out",
    task_input: TaskInput = "rows",
    pooling: Pooling | None = None,
    normalize: bool = False,
    inline: bool = False,
    opset: int = OPSET,
    choices: BuildOptions | None = None,
    shapes: Sequence[ShapeTexts] = (),
    jobs: int = 1,
    force: bool = False,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> EngineBuild:
    """Build TensorRT engines, with tensorrt and a GPU for that GPU, else with tensorrt_rtx.

    Where one engine fails the others are built all the same; the record says which and why.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        tasks: Those whose merged graphs are built; none: all tasks.
        layout: ``single-graph``, ``per-task`` or ``both``; None: ``single-graph`` for all tasks,
            ``per-task`` for those named.
        quantize: ``int8``, ``fp8`` or ``int4``: build from what ``calibrate`` wrote.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what graphs are exported in.
        output: Where engines go; None: ``engines/`` under ``output_dir``.
        output_dir: Holds ``onnx/``, whose graphs are exported first where they are missing.
        task_input: ``rows`` or ``scalar``: what the single graph's ``task_ids`` are of.
        pooling: ``mean`` or ``cls``: a bare encoder answers with one vector a row.
        normalize: Bring these vectors to length 1.
        inline: Expand the functions of the single graph.
        opset: What graphs are written in.
        choices: Workspace, TF32 and the like; None: the builder's defaults.
        shapes: Profiles as ``parse_shapes`` reads them, each ``(smallest, best, largest)`` or
            None for what is left out; none: the model's default.
        jobs: Engines to build at a time.
        force: Replace old results that are different.
        progress: Hears what is exported and built.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: An option would be ignored, or cannot be had.
        TaskNotFoundError: A task is unknown.
        BackendMissingError: No TensorRT is installed.

    Example:
        >>> import mtl_export as mx
        >>> found = mx.build_engines("adapter", base="base", tasks=["spam"])
        >>> [str(one.output.path) for one in found.built]
        ['out/engines/spam']
    """
    from mtl_export.tensorrt.options import BuildOptions

    given = {"layout": layout, "quantize": quantize, "dtype": dtype, "task_input": task_input}
    refuse_unknown_values({**given, "pooling": pooling, "opset": opset}, KNOWN)
    form = form_of(task_input, pooling, normalize=normalize, inline=inline, opset=opset)
    settings = replace(
        settings_of(checkpoint, base, source),
        task=tuple(tasks),
        all_tasks=not tasks,
        dtype=dtype,
        output=None if output is None else Path(output),
        output_dir=Path(output_dir),
        force=force,
        typed=frozenset({"inline"} | ({"task_input"} if task_input != "rows" else set())),
    )
    request = EngineRequest(choices or BuildOptions(), layout, quantize, jobs, form, shapes)
    return build_requested(settings, request, progress)


def build_requested(settings: Settings, request: EngineRequest, progress: Progress) -> EngineBuild:
    """Build what ``request`` asks for; see ``build_engines``."""
    from mtl_export.tensorrt.api import load_library
    from mtl_export.tensorrt.available import available_builder
    from mtl_export.tensorrt.options import check_options

    layout, form, quantize = request.layout, request.form, request.quantize
    swin = dense.opened(settings)
    if swin is not None:
        return _build_dense(swin, settings, request, progress)
    _refuse_beside_quantize(settings, quantize, form)
    graphs.refuse_idle(settings, graphs.layout_or_default(settings, layout), form)
    bound = sources.open_bound(settings)
    info = available_builder()
    check_options(load_library(info.name), request.choices)
    wanted = engines.wanted_graphs(settings, layout, bound.adapters.tasks)
    progress.note(f"Building with {info.name} {info.version}.")
    job = EngineJob(settings, partial(sources.recipe, "trt", bound), info, request)
    exported: list[Written] = []
    if quantize:
        engines.refuse_uncalibrated(bound, wanted, job.onnx_folder, quantize)
        _note_on_number(progress, info, quantize)
    else:
        asked = form.as_asked(settings.dtype)
        wanted = [graphs.as_edited(graph, job.onnx_folder, bound, asked) for graph in wanted]
        exporter = graphs.Exporter(bound, job.onnx_folder, dtype=settings.dtype, form=form)
        progress.expect(len(wanted))
        exported = [exporter.write(graph, progress, force=settings.force) for graph in wanted]
        for output in exported:
            progress.note(f"ONNX {output.path}: {output.status}.")
    built, failed = _build(job, wanted, info.name, request, progress)
    return EngineBuild(tuple(exported), tuple(built), tuple(failed))


def _build_dense(
    model: DenseModel, settings: Settings, request: EngineRequest, progress: Progress
) -> EngineBuild:
    """Build the engines of dense tasks; graphs that are there in another form stay as they are."""
    from mtl_export.tensorrt.api import load_library
    from mtl_export.tensorrt.available import available_builder
    from mtl_export.tensorrt.options import check_options

    dense.refuse_form(request.form, settings)
    info = available_builder()
    check_options(load_library(info.name), request.choices)
    progress.note(f"Building with {info.name} {info.version}.")
    job = EngineJob(settings, partial(dense.recipe, "trt", model), info, request)
    wanted = dense.wanted_graphs(model, settings, request.layout)
    exported: tuple[Written, ...] = ()
    if request.quantize:
        dense.refuse_uncalibrated(model, wanted, job.onnx_folder, request.quantize)
        _note_on_number(progress, info, request.quantize)
    else:
        exporter = dense.DenseExporter(model, job.onnx_folder, request.form, force=settings.force)
        exported = exporter.write_missing(wanted, progress)
    built, failed = _build(job, wanted, info.name, request, progress)
    return EngineBuild(exported, tuple(built), tuple(failed))


def _refuse_beside_quantize(settings: Settings, quantize: str | None, form: Form) -> None:
    """Refuse what only an export decides, where nothing is exported.

    Raises:
        UsageError: It was given.
    """
    asked = [f"--dtype {settings.dtype}"] if settings.dtype else []
    asked += form.as_words()
    if quantize and asked:
        raise UsageError(
            f"--quantize {quantize}: {' and '.join(asked)} beside it",
            expected=(
                "neither --dtype nor an option of the graph's form, because the graphs that "
                "mtl-export calibrate wrote are taken as they are"
            ),
            fix=f"Leave out {asked[0]}, or give it to mtl-export onnx and calibrate again",
        )


def _note_on_number(progress: Progress, info: BuilderInfo, number: str) -> None:
    if number == "int8" and info.name == "tensorrt_rtx":
        progress.note(
            "TensorRT-RTX documents INT8 for weights, not for activations: these engines are"
            " built, but may be refused by the GPU. FP8 (from compute capability 8.9) and INT4"
            " weights are documented."
        )


def _build(
    job: EngineJob,
    wanted: Sequence[graphs.Graph],
    library_name: str,
    request: EngineRequest,
    progress: Progress,
) -> tuple[list[Built], list[Failed]]:
    """Return the engines of all graphs, and what there is instead where they failed."""
    from mtl_export.tensorrt.job import run_job, with_changing_weights

    job.clear()
    orders = [job.order(graph) for graph in wanted]
    if request.choices.refit:
        orders = with_changing_weights(orders)
    progress.expect(len(orders))
    outcomes = run_job(
        orders,
        job.open_place,
        library_name=library_name,
        jobs=request.jobs,
        begin=lambda order: progress.begin(f"engine: {order.name}", is_beside=True),
        reached=progress.reached,
    )
    built, failed = [], []
    for graph, outcome in zip(wanted, outcomes, strict=True):
        order, tasks = outcome.order, tuple(task.name for task in graph.tasks)
        if outcome.error is None:
            built.append(job.built(order, tasks, outcome.seconds))
        else:
            failed.append(Failed(order.name, order.target, tasks, outcome.error))
    return built, failed
