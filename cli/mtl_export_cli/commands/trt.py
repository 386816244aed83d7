"""``mtl-export trt``: TensorRT engines from the graphs ``mtl-export onnx`` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.errors import EngineBuildError, UsageError
from mtl_export_cli import graphs, options, render, sources
from mtl_export_cli.options import Settings, option, with_settings
from mtl_export_cli.written import Written

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.output import OutputPlan
    from mtl_export.checkpoint.sentence_embedding import Pooling
    from mtl_export.graph.passes.routing import TaskInput
    from mtl_export.runtime.tensorrt.available import BuilderInfo
    from mtl_export.runtime.tensorrt.manifest import Check, EngineManifest
    from mtl_export.runtime.tensorrt.shapes import Profile
    from mtl_export.runtime.tensorrt.task_engines import Structure

ENGINE_FILE = "model.engine"
EPILOG = """\b
Example:
  mtl-export trt --all-tasks
  mtl-export trt --all-tasks --layout per-task
  mtl-export trt --task ads_rel --max-shapes input_ids:64x128
"""
# What trtexec users type -> what holds instead. TensorRT 11 and TensorRT-RTX have none of them.
GONE = {
    "--fp16": "Leave it out: an engine computes in the precision of its graph",
    "--int8": "Leave it out: quantise the ONNX graph with explicit Q/DQ nodes instead",
    "--best": "Leave it out: an engine computes in the precision of its graph",
    "--calib": "Leave it out: scales live in the graph, as explicit Q/DQ nodes",
}


def _gone(context: click.Context, parameter: click.Parameter, value: object) -> None:
    name = parameter.opts[0]
    if value:
        raise UsageError(
            where=name,
            found="TensorRT has no such switch any more",
            expected="precision to be written in the graph",
            why="networks are strongly typed since TensorRT 11, and calibrators are gone",
            fix=GONE[name],
        )


def _shapes(limit: str, text: str) -> Callable[..., Any]:
    return option(
        f"--{limit}-shapes", metavar="NAME:1x16,...",
        help=f"{text} shapes; inputs left out follow by dimension.",
    )  # fmt: skip


SHAPES = (_shapes("min", "Smallest"), _shapes("opt", "Fastest"), _shapes("max", "Largest"))
HIDDEN = tuple(
    click.option(
        name, hidden=True, expose_value=False, callback=_gone,
        **({"metavar": "FILE"} if name == "--calib" else {"is_flag": True}),
    )
    for name in GONE
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """One engine.

    Attributes:
        output: Its folder.
        manifest: What it is.
    """

    output: Written
    manifest: EngineManifest

    @property
    def run_here(self) -> str:
        """Return whether it was run here, and if not, why."""
        return f"{self.run_check.verdict} ({self.run_check.reason})".removesuffix(" ()")

    @property
    def run_check(self) -> Check:
        """Return the check that ran the engine, or says why nothing did."""
        return self.manifest.validated[-1]

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        return {
            **self.output.as_dict(),
            "builder": {"name": self.manifest.builder, "version": self.manifest.builder_version},
            "run_here": self.run_here,
            "engine": self.manifest.as_dict(),
        }


@click.command(short_help="Build TensorRT engines.", epilog=EPILOG)
@with_settings(
    options.SOURCE,
    options.SELECTION,
    [options.LAYOUT],
    options.FORM,
    SHAPES,
    options.OUTPUT,
    options.TALK,
    HIDDEN,
)
def command(
    settings: Settings,
    layout: str | None,
    task_input: TaskInput,
    pooling: Pooling | None,
    normalize: bool,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
) -> None:
    """Build TensorRT engines.

    With tensorrt and a GPU, for that GPU; else with tensorrt_rtx, which builds without
    one. The ONNX graphs are taken from onnx/ under the output folder, and exported there
    first where they are missing. Engines go to engines/, or to --output, each with a
    manifest that says what was checked and what could not be.
    """
    from mtl_export.runtime.tensorrt.available import available_builder

    form = graphs.Form.from_options(task_input, pooling, normalize=normalize)
    bound = sources.open_bound(settings)
    _refuse_parts(bound)
    builder = available_builder()
    wanted = graphs.wanted_graphs(settings, layout, bound.adapters.tasks)
    talk = render.Talk.from_settings(settings)
    talk.note(f"Building with {builder.name} {builder.version}.")
    onnx_folder = settings.output_dir / "onnx"
    exporter = graphs.Exporter(bound, onnx_folder, dtype=settings.dtype, form=form)
    shapes = (min_shapes, opt_shapes, max_shapes)
    engines = _EngineWriter(settings, bound, builder, shapes, form)
    with talk.steps(len(wanted)) as steps:
        exported = [exporter.write(graph, steps, force=settings.force) for graph in wanted]
    for output in exported:
        talk.note(f"ONNX {output.path}: {output.status}.")
    with talk.steps(len(wanted)) as steps:
        built = [engines.write(graph, graph.folder(onnx_folder), steps) for graph in wanted]
    _print(settings, exported, built)


def _refuse_parts(bound: BoundModel) -> None:
    """Refuse a model that runs as several graphs.

    Raises:
        EngineBuildError: It generates tokens.
    """
    model_class = bound.adapters.model_class
    if is_causal_lm(model_class) or is_seq2seq(model_class, bound.base.config):
        raise EngineBuildError(
            where=f"model class {model_class}",
            found="it generates tokens, by several graphs that hand on keys and values",
            expected="a model of one graph",
            why="engines with a cache could not be run and compared here yet",
            fix="Serve its ONNX graphs with ONNX Runtime, which runs on NVIDIA GPUs too"
            " (mtl-export onnx)",
        )


class _EngineWriter:
    """Writes the engines of one model; graphs that differ in weights only are parsed once."""

    def __init__(
        self,
        settings: Settings,
        bound: BoundModel,
        builder: BuilderInfo,
        shapes: Sequence[str | None],
        form: graphs.Form,
    ) -> None:
        self._settings, self._bound, self._builder = settings, bound, builder
        self._shapes, self._form = shapes, form
        self._first: Path | None = None

    def write(self, graph: graphs.Graph, onnx_folder: Path, steps: render.Steps) -> Built:
        """Build the engine of ``graph`` unless it is there already."""
        from mtl_export.bundle.output import output_folder
        from mtl_export.graph.writer import MODEL_FILE
        from mtl_export.runtime.tensorrt.manifest import EngineManifest, manifest_path

        steps.begin(f"engine: {graph.name}")
        started = perf_counter()
        onnx_path = onnx_folder / MODEL_FILE
        self._first = self._first or onnx_path
        profile = self._profile(onnx_path)
        size_bytes = sum(file.stat().st_size for file in onnx_folder.iterdir() if file.is_file())
        with output_folder(
            graph.folder(self._settings.folder("engines")),
            recipe=self._recipe(graph, profile),
            force=self._settings.force,
            estimated_size_bytes=size_bytes,
        ) as plan:
            if not plan.up_to_date:
                self._build(plan, onnx_path, profile, steps)
        output = Written.from_plan(
            plan, [task.name for task in graph.tasks], perf_counter() - started
        )
        manifest = EngineManifest.read(manifest_path(plan.target / ENGINE_FILE))
        return Built(output, manifest)

    def _build(
        self, plan: OutputPlan, onnx_path: Path, profile: Profile, steps: render.Steps
    ) -> None:
        from mtl_export.runtime.tensorrt.manifest import manifest_path
        from mtl_export.runtime.tensorrt.options import BuildOptions
        from mtl_export.runtime.tensorrt.task_engines import build_with_structure

        engine_path = plan.folder / ENGINE_FILE
        manifest = build_with_structure(
            self._structure,
            onnx_path,
            engine_path,
            options=BuildOptions(profiles=(profile,)),
            progress=lambda phase, fraction: steps.within(int(fraction * 1000), 1000),
            library_name=None,
        )
        manifest.write(manifest_path(engine_path))

    @cached_property
    def _structure(self) -> Structure | None:
        from mtl_export.runtime.tensorrt.api import load_library
        from mtl_export.runtime.tensorrt.task_engines import read_structure

        parser = load_library(self._builder.name).trt.OnnxParser
        if self._first is None or not hasattr(parser, "load_model_proto"):
            return None
        return read_structure(self._first)

    def _profile(self, onnx_path: Path) -> Profile:
        from mtl_export_cli.profiles import profile_from_options

        return profile_from_options(onnx_path, *self._shapes)

    def _recipe(self, graph: graphs.Graph, profile: Profile) -> Any:
        limits = {
            name: " ".join("x".join(map(str, shape)) for shape in shapes)
            for name, shapes in profile.shapes.items()
        }
        return sources.recipe(
            "trt",
            self._bound,
            {
                "layout": graph.layout,
                "served": [task.name for task in graph.tasks],
                "builder": f"{self._builder.name} {self._builder.version}",
                "profile": limits,
                "dtype": self._settings.dtype or graphs.GRAPH_DTYPE,
                **self._form.as_options(graph),
            },
        )


def _print(settings: Settings, exported: Sequence[Written], built: Sequence[Built]) -> None:
    if settings.json:
        document = {"outputs": [one.as_dict() for one in built]}
        onnx = [output.as_dict() for output in exported]
        render.print_json({"ok": True, "command": "trt", **document, "onnx": onnx})
        return
    render.print_table(
        ("artefact", "builder", "size", "seconds", "tasks", "status", "run here"),
        [
            (
                str(one.output.path / one.manifest.engine),
                f"{one.manifest.builder} {one.manifest.builder_version}",
                render.size_text(one.manifest.engine_size_bytes),
                f"{one.output.seconds:.1f}",
                ", ".join(one.output.tasks),
                one.output.status,
                one.run_check.verdict,
            )
            for one in built
        ],
        right=("size", "seconds"),
    )
    for reason in dict.fromkeys(one.run_check.reason for one in built if one.run_check.reason):
        render.print_line(f"not run here: {reason}")
