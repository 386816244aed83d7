"""Find what was exported: merged folders, graphs and engines under the output folder.

A folder's manifest says which files it had and their hashes. What no longer agrees with it
(a file edited, cut short or gone) is handed on as the artefact's defect, so that a check
cannot shrink because something was deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api import quantised
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.checkpoint.sentence_embedding import METADATA_KEY, SentenceEmbedding
from mtl_export.names import (
    ADAPTER_INPUT,
    ADAPTER_INPUT_ONNX,
    BASE_KEY,
    CHECKPOINT_KEY,
    DTYPE_KEY,
    DTYPES,
    ENCODER_FILE,
    MERGED_MODEL,
    MODEL_FILE,
    PER_TASK,
    PER_TASK_ENGINE,
    PER_TASK_ONNX,
    PREFILL_FILE,
    QUANTISED_DTYPES,
    SINGLE_ENGINE,
    SINGLE_GRAPH,
    SINGLE_ONNX,
    TASK_INPUT_KEY,
)
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.report import Cell
from mtl_export.runtime.model_files import ENGINE_SUFFIX, runner_of

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.runtime.runners.base import Runner

KINDS = (
    *(MERGED_MODEL, PER_TASK_ONNX, SINGLE_ONNX, ADAPTER_INPUT_ONNX),
    *(f"{layout} {number}" for number in QUANTISED_DTYPES for layout in (PER_TASK, SINGLE_GRAPH)),
    *(PER_TASK_ENGINE, SINGLE_ENGINE),
    *(
        f"{engine} {number}"
        for number in QUANTISED_DTYPES
        for engine in (PER_TASK_ENGINE, SINGLE_ENGINE)
    ),
)
NOT_EXPORTED = "not exported"
# transformers' word in config.json -> ours
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look.

    Attributes:
        merged: Holds ``<task>/``.
        onnx: Holds ``model.onnx`` and ``<task>/model.onnx``; for a causal language model
            ``prefill.onnx`` and ``decode.onnx``, for an encoder-decoder ``encoder.onnx``,
            ``decoder.onnx`` and ``decoder_with_past.onnx``.
        engines: Holds ``model.engine`` and ``<task>/model.engine``, or one for each graph.
        quantised: Holds ``onnx-int8/``, ``engines-int8/`` and so on; None: do not look.
    """

    merged: Path
    onnx: Path
    engines: Path
    quantised: Path | None = None


def find_artefacts(
    bound: BoundModel, places: Places, *, threads: int
) -> tuple[list[Artefact], list[Cell]]:
    """Return what exists, and a ``not-run`` cell for what could but does not."""
    from mtl_export.runtime.runners.pytorch import MergedRunner
    from mtl_export.runtime.runners.torch_language import MergedLanguageRunner
    from mtl_export.runtime.runners.torch_seq2seq import MergedSeq2SeqRunner

    runners: dict[str, type[MergedRunner]] = {
        PREFILL_FILE: MergedLanguageRunner,
        ENCODER_FILE: MergedSeq2SeqRunner,
    }
    graph = first_graph(bound)
    merged = runners.get(graph, MergedRunner)
    return artefacts_of(bound.adapters.tasks, places, merged, graph=graph, threads=threads)


def artefacts_of(
    tasks: Sequence[Task],
    places: Places,
    merged: Callable[[Path], Runner],
    *,
    graph: str = MODEL_FILE,
    threads: int,
) -> tuple[list[Artefact], list[Cell]]:
    """Return what exists of these tasks, and a ``not-run`` cell for what could but does not.

    Args:
        tasks: In id order.
        places: Where to look.
        merged: Returns the runner of a merged folder.
        graph: The file that a model runs as, or the first of several.
        threads: Of ONNX Runtime; 0 lets it decide.
    """
    found: list[Artefact] = []
    missing: list[Cell] = []
    for task in tasks:
        _merged(places.merged / task.name, task, found, missing, merged)
    for task in tasks:
        _onnx(places.onnx / task.name / graph, task, threads, found, missing)
    _onnx(places.onnx / graph, None, threads, found, missing)
    # An alternative to the single graph that few ask for, so its absence is no gap.
    adapted = places.onnx / ADAPTER_INPUT
    if adapted.is_dir():
        if graph == MODEL_FILE:
            _onnx(adapted / graph, None, threads, found, missing, name=ADAPTER_INPUT_ONNX)
        else:
            missing.append(_several_adapters())
    engine = Path(graph).with_suffix(ENGINE_SUFFIX)
    for task in tasks:
        _engine(places.engines / task.name / engine, task, found, missing)
    _engine(places.engines / engine, None, found, missing)
    if graph == MODEL_FILE and places.quantised is not None:
        for number in QUANTISED_DTYPES:
            _quantised(tasks, places, places.quantised, number, threads, found)
    return [_as_its_graph(one, found) for one in found], missing


def _as_its_graph(artefact: Artefact, found: list[Artefact]) -> Artefact:
    """Return an engine with the edits of the single graph that it was built from."""
    for one in found:
        is_same = one.checkpoint_sha256 == artefact.checkpoint_sha256
        if one.edited is not None and artefact.name == SINGLE_ENGINE and is_same:
            return replace(artefact, edited=one.edited)
    return artefact


def _quantised(
    tasks: Sequence[Task],
    places: Places,
    parent: Path,
    number: str,
    threads: int,
    found: list[Artefact],
) -> None:
    """Find the graphs and engines of one format; few ask for all, so absence is no gap."""
    for task in (*tasks, None):
        inner = Path(task.name if task else "")
        path = parent / f"onnx-{number}" / inner / MODEL_FILE
        name = f"{PER_TASK if task else SINGLE_GRAPH} {number}"
        own: list[Artefact] = []
        _onnx(path, task, threads, own, [], name=name)
        layout = f"task-{task.name}" if task else SINGLE_GRAPH
        for one in own:
            known = quantised.read_quantised(
                Path() if one.defect else path,
                number,
                places.onnx / inner / MODEL_FILE,
                artefact=name,
                times=parent / "calibration" / f"{layout}.{number}.latency.json",
            )
            found.append(replace(one, quantised=known))
    for task in (*tasks, None):
        inner = Path(task.name if task else "")
        own = []
        _engine(parent / f"engines-{number}" / inner / "model.engine", task, own, [])
        for one in own:
            name = f"{one.name} {number}"
            known = quantised.read_quantised(Path(), number, None, artefact=name)
            found.append(replace(one, name=name, quantised=known))


def first_graph(bound: BoundModel) -> str:
    """Return the file of the graph that a model runs as, or of the first of several."""
    model_class = bound.adapters.model_class
    if is_causal_lm(model_class):
        return PREFILL_FILE
    return ENCODER_FILE if is_seq2seq(model_class, bound.base.config) else MODEL_FILE


@dataclass(frozen=True, slots=True)
class _Record:
    """What a folder's manifest says of it.

    Attributes:
        sources: SHA-256 of what it was made from; empty without a manifest.
        defect: What no longer agrees with the manifest; empty if nothing.
        is_there: There is a manifest, so the folder was once whole.
        dtype: What it says it computes in.
        takes_one_task: Its graph has one task for the whole batch.
        embedding: How its graph pools hidden states; None if it does not.
    """

    sources: Mapping[str, str]
    defect: str
    is_there: bool
    dtype: str = "fp32"
    takes_one_task: bool = False
    embedding: SentenceEmbedding | None = None


def _record(folder: Path) -> _Record:
    from mtl_export.bundle.manifest import damage, read_manifest
    from mtl_export.errors import IntegrityError

    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        return _Record({}, str(error), is_there=True)
    if manifest is None:
        return _Record({}, "", is_there=False)
    options = manifest.recipe.options
    return _Record(
        manifest.recipe.sources,
        "; ".join(damage(folder, manifest)),
        is_there=True,
        dtype=str(options.get("dtype", "fp32")),
        takes_one_task=options.get("task_input") == "scalar",
        embedding=SentenceEmbedding.from_json(str(options.get("embedding", ""))),
    )


def _merged(
    folder: Path,
    task: Task,
    found: list[Artefact],
    missing: list[Cell],
    runner: Callable[[Path], Runner],
) -> None:
    record = _record(folder)
    if not record.is_there and not (folder / "config.json").is_file():
        missing.append(_absent(MERGED_MODEL, task, "merge"))
        return
    found.append(
        Artefact(
            name=MERGED_MODEL,
            kind=PER_TASK,
            runner=runner(folder),
            task=task,
            dtype="fp32" if record.defect else _config_dtype(folder),
            checkpoint_sha256=record.sources.get("checkpoint_sha256", ""),
            base_sha256=record.sources.get("base_sha256", ""),
            defect=record.defect,
            path=folder,
        )
    )


def _onnx(
    path: Path,
    task: Task | None,
    threads: int,
    found: list[Artefact],
    missing: list[Cell],
    *,
    name: str = "",
) -> None:
    from mtl_export.graph.origins import EditedGraph
    from mtl_export.runtime.ort import onnx_metadata
    from mtl_export.runtime.runners.one_task import one_task

    name = name or (SINGLE_ONNX if task is None else PER_TASK_ONNX)
    record = _record(path.parent)
    if not record.is_there and not path.is_file():
        missing.append(_absent(name, task, "onnx"))
        return
    metadata = {} if record.defect else onnx_metadata(path)
    dtype, defect = _checked_dtype(metadata.get(DTYPE_KEY, "fp32"), record.defect)
    runner = runner_of(path, threads=threads)
    takes_one_task = metadata.get(TASK_INPUT_KEY) == "scalar"
    number = quantised.number_of(metadata)
    found.append(
        Artefact(
            name=name,
            kind=SINGLE_GRAPH if task is None else PER_TASK,
            runner=one_task(runner) if takes_one_task else runner,
            task=task,
            dtype=dtype,
            checkpoint_sha256=metadata.get(CHECKPOINT_KEY, ""),
            base_sha256=metadata.get(BASE_KEY, ""),
            defect=defect,
            path=path,
            embedding=SentenceEmbedding.from_json(metadata.get(METADATA_KEY, "")),
            # Also where --onnx names a folder of such graphs.
            quantised=quantised.read_quantised(path, number, None, artefact=name)
            if number
            else None,
            edited=EditedGraph.from_metadata(metadata),
        )
    )


def _engine(path: Path, task: Task | None, found: list[Artefact], missing: list[Cell]) -> None:
    from mtl_export.runtime.runners.one_task import one_task
    from mtl_export.tensorrt import TensorRTBackend

    name = SINGLE_ENGINE if task is None else PER_TASK_ENGINE
    record = _record(path.parent)
    if not record.is_there and not path.is_file():
        missing.append(_absent(name, task, "trt"))
        return
    dtype, defect = _checked_dtype(record.dtype, record.defect)
    defect = defect or _engine_problem(path, task, dtype)
    if path.stem != Path(MODEL_FILE).stem and not defect:
        reason = "engines that hand on keys and values have no runner here; their graphs have"
        missing.append(Cell(name, "-", task.name if task else "*", "*", "not-run", reason))
        return
    runner = TensorRTBackend(path)
    hashes = record.sources if record.defect else _engine_sources(path, record.sources)
    found.append(
        Artefact(
            name=name,
            kind=SINGLE_GRAPH if task is None else PER_TASK,
            runner=one_task(runner) if record.takes_one_task else runner,
            task=task,
            dtype=dtype,
            checkpoint_sha256=hashes.get("checkpoint_sha256", ""),
            base_sha256=hashes.get("base_sha256", ""),
            defect=defect,
            path=path,
            embedding=record.embedding,
        )
    )


def _engine_sources(path: Path, of_folder: Mapping[str, str]) -> Mapping[str, str]:
    """Return what the graph of an engine was made from, else what its folder was."""
    from mtl_export.errors import IntegrityError
    from mtl_export.tensorrt.manifest import EngineManifest, manifest_path

    try:
        return {**of_folder, **EngineManifest.read(manifest_path(path)).provenance}
    except IntegrityError:
        return of_folder  # an engine without a manifest is refused where it is run


def _engine_problem(path: Path, task: Task | None, dtype: str) -> str:
    """Return how an engine's manifest contradicts its place or dtype; "" if it does not."""
    from mtl_export.errors import IntegrityError
    from mtl_export.parity.checks.metadata import WORDS
    from mtl_export.tensorrt.manifest import EngineManifest, manifest_path

    try:
        manifest = EngineManifest.read(manifest_path(path))
    except IntegrityError:
        return ""  # it is refused where it is run
    served = [one.get("name") for one in manifest.tasks]
    if manifest.layout and (manifest.layout == PER_TASK) != (task is not None):
        place = f"task {task.name}'s own" if task else "that of all tasks"
        return f"{path} is an engine of layout {manifest.layout}, not {place}"
    if task is not None and manifest.layout and served != [task.name]:
        return f"{path} serves {', '.join(map(str, served))}, not task {task.name}"
    if dtype in WORDS and WORDS[dtype] not in manifest.precision:
        return f"it declares {WORDS[dtype]}, but {path} computes in {', '.join(manifest.precision)}"
    return ""


def _checked_dtype(declared: str, defect: str) -> tuple[str, str]:
    """Return a dtype that has a noise floor, and what is wrong with an artefact, if anything."""
    if declared in DTYPES:
        return declared, defect
    return "fp32", defect or f"it declares the dtype {declared!r}, not one of {', '.join(DTYPES)}"


def is_absent(cell: Cell) -> bool:
    """Return whether a cell says that something could have been exported and was not."""
    return cell.verdict == "not-run" and cell.reason.startswith(NOT_EXPORTED)


def _absent(name: str, task: Task | None, verb: str) -> Cell:
    options = "--all-tasks" if task is None else "--task NAME"
    reason = f"{NOT_EXPORTED}; mtl-export {verb} {options} makes it"
    return Cell(name, "-", task.name if task else "*", "*", "not-run", reason)


def _several_adapters() -> Cell:
    """Return the cell of a language model's graphs that take adapters.

    Parity asks its steps for other tasks than their prompts', to see that each graph routes;
    a run under one adapter answers for one task from prompt to end.
    """
    reason = "language models that take adapters have no runner here; TaskSession runs them"
    return Cell(ADAPTER_INPUT_ONNX, "-", "*", "*", "not-run", reason)


def _config_dtype(folder: Path) -> str:
    config = read_json(folder / "config.json", {"dtype?": object, "torch_dtype?": object})
    stated = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(stated if isinstance(stated, str) else "float32", "fp32")
