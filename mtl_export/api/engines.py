"""The engines of one model: from which graphs, with which options, into which folders.

    onnx/[<task>/]STEM.onnx          -> engines/[<task>/]STEM.engine          as exported
    onnx-int8/[<task>/]STEM.onnx     -> engines-int8/[<task>/]STEM.engine     --quantize int8

STEM is ``model``; for models that generate it is ``prefill`` and ``decode``, or ``encoder``,
``decoder`` and ``decoder_with_past``. What decides a folder's bytes, its recipe, holds the
graphs' hashes, so that an engine is found finished only if its graph is still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.api import graphs
from mtl_export.api.engine_shapes import ShapeTexts, profiles_from_options
from mtl_export.api.graph_form import GRAPH_DTYPE, Form
from mtl_export.api.settings import Settings
from mtl_export.api.sources import other_source
from mtl_export.api.written import Written
from mtl_export.checkpoint.sentence_embedding import METADATA_KEY
from mtl_export.errors import MtlExportError, UsageError, shortened
from mtl_export.names import (
    CHECKPOINT_KEY,
    DTYPE_KEY,
    LAYOUTS,
    MODEL_FILE,
    PER_TASK,
    SINGLE_GRAPH,
    TASK_INPUT_KEY,
)
from mtl_export.runtime.model_files import ENGINE_SUFFIX

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import Manifest, OptionValue, Recipe
    from mtl_export.bundle.output import OutputPlan
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.tensorrt.available import BuilderInfo
    from mtl_export.tensorrt.job import EngineOrder, EnginePart
    from mtl_export.tensorrt.manifest import BuildCheck, EngineManifest
    from mtl_export.tensorrt.options import BuildOptions

BOTH = "both"
ENGINE_LAYOUTS = (*LAYOUTS, BOTH)


def wanted_graphs(
    settings: Settings, layout: str | None, tasks: Sequence[Task]
) -> list[graphs.Graph]:
    """Return the graphs that the options ask for, the single one before those of tasks.

    Raises:
        UsageError: A single graph of some tasks only, or no task was asked for.
        TaskNotFoundError: A name is unknown.
    """
    layouts = (SINGLE_GRAPH, PER_TASK) if layout == BOTH else (layout,)
    return [graph for one in layouts for graph in graphs.wanted_graphs(settings, one, tasks)]


@dataclass(frozen=True)
class Built:
    """One folder of engines.

    Attributes:
        output: The folder.
        manifests: Its engines.
    """

    output: Written
    manifests: tuple[EngineManifest, ...]

    @property
    def artefact(self) -> str:
        """Return the path of its engine, or of its engines in one."""
        names = [manifest.engine for manifest in self.manifests]
        if len(names) > 1:
            stems = ",".join(name.removesuffix(ENGINE_SUFFIX) for name in names)
            names = [f"{{{stems}}}{ENGINE_SUFFIX}"]
        return str(self.output.path / names[0])

    @property
    def size_bytes(self) -> int:
        """Return the size of its engines."""
        return sum(manifest.engine_size_bytes for manifest in self.manifests)

    @property
    def run_check(self) -> BuildCheck:
        """Return the check that ran its engines, or says why nothing did."""
        return self.manifests[0].validated[-1]

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        first, check = self.manifests[0], self.run_check
        return {
            **self.output.as_dict(),
            "builder": {"name": first.builder, "version": first.builder_version},
            "run_here": f"{check.verdict} ({check.reason})".removesuffix(" ()"),
            "engines": [manifest.as_dict() for manifest in self.manifests],
        }


@dataclass(frozen=True)
class Failed:
    """A folder of engines that there is not.

    Attributes:
        name: What it was to be, for people.
        path: The folder.
        tasks: The tasks it was to serve.
        error: Why.
    """

    name: str
    path: Path
    tasks: tuple[str, ...]
    error: MtlExportError

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        return {
            "name": self.name,
            "path": str(self.path),
            "tasks": list(self.tasks),
            "error": self.error.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Which engines are to be built, and how.

    Attributes:
        choices: What is chosen about every build; profiles come from ``shapes``.
        layout: ``single-graph``, ``per-task`` or ``both``; None: that of the tasks asked for.
        quantize: What calibrated graphs are quantised to; None: the graphs as exported.
        jobs: Engines to build at a time.
        form: Of graphs that are exported first.
        shapes: The profiles as typed; none for the model's default.
    """

    choices: BuildOptions
    layout: str | None = None
    quantize: str | None = None
    jobs: int = 1
    form: Form = field(default_factory=Form)
    shapes: Sequence[ShapeTexts] = ()


class EngineJob:
    """Orders engines of one model, and opens the folders they go to.

    Args:
        settings: Where to, and whether to replace what is there.
        recipe_of: Returns what decides a folder's bytes, given the options that do.
        info: The library that builds.
        request: What to build.
    """

    def __init__(
        self,
        settings: Settings,
        recipe_of: Callable[[dict[str, OptionValue]], Recipe],
        info: BuilderInfo,
        request: EngineRequest,
    ) -> None:
        self._settings, self._recipe_of, self._info = settings, recipe_of, info
        self._request = request
        ending = f"-{request.quantize}" if request.quantize else ""
        self.onnx_folder = settings.output_dir / f"onnx{ending}"
        self.folder = settings.folder(f"engines{ending}")
        self._plans: dict[Path, OutputPlan] = {}
        self._recipes: dict[Path, Recipe] = {}

    def order(self, graph: graphs.Graph) -> EngineOrder:
        """Return the order of the engines of ``graph``, which is exported.

        Raises:
            UsageError: A shape is malformed or does not fit.
            EngineBuildError: The graph cannot be read.
        """
        from mtl_export.bundle.manifest import read_manifest
        from mtl_export.tensorrt.job import EngineOrder, EnginePart

        folder = graph.folder(self.onnx_folder)
        manifest = read_manifest(folder)
        files = manifest.files if manifest else {}
        paths = [folder / name for name in sorted(files) if name.endswith(".onnx")]
        choices = self._request.choices
        profiles = {
            path: choices.profiles
            or profiles_from_options(
                path, self._request.shapes, beside=[other for other in paths if other != path]
            )
            for path in paths
        }
        parts = tuple(
            EnginePart(
                onnx_path=path,
                file=f"{path.stem}{ENGINE_SUFFIX}",
                options=replace(choices, profiles=profiles[path]),
            )
            for path in paths
        )
        target = graph.folder(self.folder)
        if manifest is not None:
            self._recipes[target] = self._recipe(graph, parts, manifest)
        size_bytes = sum(entry.size_bytes for entry in files.values())
        return EngineOrder(graph.name, target, parts, size_bytes)

    @contextmanager
    def open_place(self, order: EngineOrder) -> Iterator[Path | None]:
        """Give the folder of ``order`` to write to, and put it in place at the end; None: it is.

        Raises:
            OutputError: It holds something else, or cannot be written.
        """
        from mtl_export.bundle.manifest import FileEntry
        from mtl_export.bundle.output import output_folder
        from mtl_export.tensorrt.manifest import EngineManifest, manifest_path

        with output_folder(
            order.target,
            recipe=self._recipes[order.target],
            force=self._settings.force,
            estimated_size_bytes=order.size_bytes,
        ) as plan:
            yield None if plan.up_to_date else plan.folder
            if not plan.up_to_date:
                for part in order.parts:
                    made = EngineManifest.read(manifest_path(plan.folder / part.file))
                    plan.known[made.engine] = FileEntry(made.engine_sha256, made.engine_size_bytes)
        self._plans[order.target] = plan

    def built(self, order: EngineOrder, tasks: Sequence[str], seconds: float) -> Built:
        """Return the record of an order whose folder was put in place."""
        from mtl_export.tensorrt.manifest import EngineManifest, manifest_path

        manifests = [
            EngineManifest.read(manifest_path(order.target / part.file)) for part in order.parts
        ]
        written = Written.from_plan(self._plans[order.target], tasks, seconds)
        return Built(written, tuple(manifests))

    def clear(self) -> None:
        """Remove what killed runs left where engines go."""
        from mtl_export.bundle.staging import remove_stale

        for parent in (self.folder.absolute().parent, self.folder):
            if parent.is_dir():
                remove_stale(parent)

    def _recipe(
        self, graph: graphs.Graph, parts: Sequence[EnginePart], manifest: Manifest
    ) -> Recipe:
        from mtl_export.tensorrt.source import read_source

        metadata: dict[str, str] = {}
        hashes: dict[str, str] = {}
        for part in parts:
            source = read_source(part.onnx_path)
            metadata |= source.metadata
            for name in (part.onnx_path.name, *source.external_files):
                hashes[f"onnx_sha256 {name}"] = manifest.files[name].sha256
        chosen: Any = self._request.choices.given()
        # It shortens a build, and asks for no other engine.
        chosen.pop("timing_cache", None)
        options: dict[str, OptionValue] = {
            "layout": graph.layout,
            "served": [task.name for task in graph.tasks],
            "builder": f"{self._info.name} {self._info.version}",
            "profile": _profile_texts(parts),
            "dtype": metadata.get(DTYPE_KEY, GRAPH_DTYPE),
            **chosen,
        }
        if metadata.get(TASK_INPUT_KEY, "rows") != "rows":
            options["task_input"] = metadata[TASK_INPUT_KEY]
        if METADATA_KEY in metadata:
            options["embedding"] = metadata[METADATA_KEY]
        if self._request.quantize:
            options["quantize"] = self._request.quantize
        if graph.is_edited:
            options["tasks"] = options["served"]
            hashes["checkpoint_sha256"] = metadata[CHECKPOINT_KEY]
        recipe = self._recipe_of(options)
        return replace(recipe, sources={**recipe.sources, **hashes})


def _profile_texts(parts: Sequence[EnginePart]) -> dict[str, str]:
    """Return every input's shapes, ``1x1 8x64 32x512`` a profile, by input or by graph and it."""
    texts: dict[str, str] = {}
    for part in parts:
        prefix = f"{part.onnx_path.stem}." if len(parts) > 1 else ""
        for profile in part.options.profiles:
            for name, shapes in profile.shapes.items():
                text = " ".join("x".join(map(str, shape)) for shape in shapes)
                key = f"{prefix}{name}"
                texts[key] = f"{texts[key]}, {text}" if key in texts else text
    return texts


def refuse_uncalibrated(
    bound: BoundModel, wanted: Sequence[graphs.Graph], onnx_folder: Path, number: str
) -> None:
    """Refuse quantised engines whose graphs ``mtl-export calibrate`` has not written.

    Raises:
        UsageError: Graphs are missing, of another checkpoint, or damaged; or the model runs
            as several graphs, which cannot be calibrated.
    """
    from mtl_export.api.artefacts import first_graph

    where = f"--quantize {number}"
    if first_graph(bound) != MODEL_FILE:
        raise UsageError(
            f"{where}: {bound.adapters.model_class} generates tokens, by several graphs",
            expected="a model of one graph, because only those are calibrated",
            fix=f"Leave {where} out, or pass --dtype fp16",
        )
    problems, needs_force = [], False
    for graph in wanted:
        folder = graph.folder(onnx_folder)
        problem = _calibration_problem(bound, folder)
        if problem:
            problems.append(f"{folder / MODEL_FILE} {problem}")
            needs_force = needs_force or problem != MISSING
    if not problems:
        return
    layouts = {graph.layout for graph in wanted}
    words = ["mtl-export calibrate", where]
    words += [f"--layout {layouts.pop()}"] if len(layouts) == 1 else []
    words += ["--force"] if needs_force else []
    raise UsageError(
        f"{where}: {shortened(problems)}",
        expected=(
            "the quantised graphs of this checkpoint, because engines compute what their graph "
            "says, and scales come from calibration data"
        ),
        fix=f"Run {' '.join(words)} first",
    )


MISSING = "is missing"


def _calibration_problem(bound: BoundModel, folder: Path) -> str:
    """Return what is wrong with a calibrated folder; "" if nothing."""
    from mtl_export.bundle.manifest import damage, read_manifest
    from mtl_export.runtime.ort import onnx_metadata

    manifest = read_manifest(folder)
    if manifest is None or MODEL_FILE not in manifest.files:
        return MISSING
    found = manifest.recipe.sources
    if (found.get("base_sha256"), found.get("checkpoint_sha256")) != (
        bound.base.sha256,
        bound.adapters.checkpoint_sha256,
    ):
        return "is of another checkpoint or base"
    broken = damage(folder, manifest)
    if broken:
        return f"is damaged ({shortened(broken)})"
    # What the folder says is what calibrate was told; the graph knows what it was traced from.
    other = other_source(bound, onnx_metadata(folder / MODEL_FILE))
    return f"is {other}" if other else ""
