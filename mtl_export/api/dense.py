"""The verbs for a Swin with task streams: the same commands, folders and records.

Its file is the whole model, so nothing is bound to a base; every image is answered by every task,
so nothing is routed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from mtl_export.api import graphs, sources
from mtl_export.api.graph_form import GRAPH_DTYPE, Form
from mtl_export.api.progress import Progress
from mtl_export.api.settings import Settings
from mtl_export.api.written import Written
from mtl_export.errors import UsageError
from mtl_export.names import LAYOUTS, SINGLE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtl_export.api.graphs import Graph
    from mtl_export.bundle.manifest import OptionValue, Recipe
    from mtl_export.dense.model import DenseModel

FOLDER_BYTES_MORE = 1 << 20  # a folder's small files


def opened(settings: Settings) -> DenseModel | None:
    """Return the model, at the size of image asked for; None if the checkpoint is no such file.

    Raises:
        UsageError: An option would be ignored, or no window divides the size.
        CheckpointError: The file is broken, or its tensors do not fit each other.
    """
    from mtl_export.checkpoint.formats.mtlora_swin import is_mtlora

    place = settings.checkpoint
    if place is None or not place.exists() or not is_mtlora(place):
        return None
    from mtl_export.dense.model import open_dense

    idle = {
        "--base": settings.base,
        "--alpha": settings.alpha,
        "--temperature": settings.temperature,
        "--downsample": settings.downsample,
        "--biases": settings.biases,
    }
    for words, value in idle.items():
        # What stands in a settings file may be meant for other checkpoints.
        is_meant = not settings.config_file or words.removeprefix("--") in settings.typed
        if value is not None and is_meant:
            raise UsageError(
                f"{words}: {place} holds a whole model, heads and all",
                expected=f"no {words}, because nothing of it would be read",
                fix=f"Leave out {words}",
            )
    given = replace(settings, alpha=None, temperature=None, downsample=None, biases=None)
    model = open_dense(sources.open_settings_checkpoint(given))
    for target in (settings.output_dir, settings.output):
        if target is not None:
            sources.refuse_in_source(
                target, model.checkpoint, None, where=f"output folder {target}",
                fix="Pass another folder to --output",
            )  # fmt: skip
    return model if settings.image_size is None else model.at(settings.image_size)


def recipe(command: str, model: DenseModel, options: dict[str, OptionValue]) -> Recipe:
    """Return what decides the bytes of one output folder; see ``sources.recipe``."""
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.version import VERSION

    given: dict[str, OptionValue] = {"tasks": [task.name for task in model.tasks]}
    given["image_size"] = model.described.image_size
    # The base is in the same file.
    digests = dict.fromkeys(("base_sha256", "checkpoint_sha256"), model.checkpoint.sha256)
    return Recipe(command, {**given, **options}, digests, VERSION)


def folds(model: DenseModel) -> list[dict[str, object]]:
    """Return what becomes of each adapted layer, as JSON's types.

    ``layer``; ``folds`` (what goes into one weight); ``stays`` (what remains beside it, empty
    where nothing does) and ``ranks`` (those of the tasks' matrices that remain).
    """
    from mtl_export.dense.fold import layer_folds

    found: list[dict[str, object]] = []
    for one in layer_folds(model.tensors, model.described):
        is_shared = one.shared_rank and (not one.kept or model.described.mode == "matrixv2")
        stays = {
            "": "",
            "streams": "W x and the task's own A_t, B_t on its second stream",
            "streams and norm": "all tasks' A_t, B_t, and LayerNorm over their sum",
        }[one.kept]
        found.append(
            {
                "layer": one.name,
                "folds": f"W + s B A, rank {one.shared_rank}" if is_shared else "scales",
                "stays": stays,
                "ranks": list(one.ranks),
            }
        )
    return found


def merge(model: DenseModel, settings: Settings, progress: Progress) -> tuple[Written, ...]:
    """Write a folder of its own for each task asked for."""
    from mtl_export.bundle.output import output_folder
    from mtl_export.dense.merged import write_merged

    tasks = sources.selected_tasks(settings, model.tasks)
    dtype, parent = settings.dtype or GRAPH_DTYPE, settings.folder("merged")
    progress.expect(len(tasks))
    results = []
    for task in tasks:
        started = perf_counter()
        progress.begin(f"merge: {task.name}")
        made_from = recipe("merge", model, {"task": task.name, "dtype": dtype})
        with output_folder(
            parent / task.name,
            recipe=made_from,
            force=settings.force,
            estimated_size_bytes=_size_bytes(model),
        ) as plan:
            if not plan.up_to_date:
                write_merged(model, task.name, plan.folder, dtype)
                report = json.dumps({"task": task.name, "layers": folds(model)}, indent=2)
                (plan.folder / "merge-report.json").write_text(report + "\n", encoding="utf-8")
        results.append(Written.from_plan(plan, [task.name], perf_counter() - started))
    return tuple(results)


def wanted_graphs(model: DenseModel, settings: Settings, layout: str | None) -> list[Graph]:
    """Return the graphs that the options ask for; ``layout`` may be ``both``.

    Raises:
        UsageError: A single graph of some tasks only, a layout that images do not have, or no
            task was asked for.
        TaskNotFoundError: A name is unknown.
    """
    layouts = LAYOUTS if layout == "both" else (layout,)
    if not set(layouts) <= {None, *LAYOUTS}:
        raise UsageError(
            f"--layout {layout}: {model.checkpoint.path} takes images and no adapters",
            expected=f"{' or '.join(LAYOUTS)}",
            fix=f"Pass --layout {SINGLE_GRAPH}",
        )
    return [graph for one in layouts for graph in graphs.wanted_graphs(settings, one, model.tasks)]


def refuse_form(form: Form, settings: Settings, *, is_linked: bool = False) -> None:
    """Refuse what only graphs of texts can take or give.

    Raises:
        UsageError: It was asked for.
    """
    words = [one for one in form.as_words() if not one.startswith("--opset")]
    if "task_input" in settings.typed:
        words.insert(0, f"--task-input {form.task_input}")
    words += ["--link-data"] if is_linked else []
    words += [f"--dtype {settings.dtype}"] if settings.dtype not in {None, GRAPH_DTYPE} else []
    if not words:
        return
    why = {
        "--task-input": "every image is answered by every task, each in an output of its own",
        "--pooling": "the outputs are maps, not tokens",
        "--dtype": "graphs of images are in float32, and quantised by mtl-export calibrate",
    }
    reason = why.get(words[0].split()[0], "the graph has no such thing")
    raise UsageError(
        f"{words[0]}: a graph of dense tasks beside it",
        expected=f"no {words[0].split()[0]}, because {reason}",
        fix=f"Leave out {words[0].split()[0]}",
    )


class DenseExporter:
    """Writes graphs of one model.

    Args:
        model: As trained, at the size of image wanted.
        parent: Where the folders go.
        form: Says the opset.
        force: Replace old results that are different.
        is_postprocessed: Graphs end in argmax, sigmoid or normalisation.

    Raises:
        UsageError: Nobody says what a task is of, which post-processing needs.
    """

    def __init__(
        self,
        model: DenseModel,
        parent: Path,
        form: Form,
        *,
        force: bool,
        is_postprocessed: bool = False,
    ) -> None:
        from mtl_export.dense.kinds import refuse_unknown

        if is_postprocessed:
            refuse_unknown(tuple(task.name for task in model.tasks))
        self._model, self._parent, self._form = model, parent, form
        self._force, self._is_postprocessed = force, is_postprocessed

    def write(self, wanted: Sequence[Graph], progress: Progress) -> tuple[Written, ...]:
        """Write the graphs, but for those that are there already.

        Raises:
            OutputError: Something else is there.
        """
        progress.expect(len(wanted))
        return tuple(self._write(graph, progress) for graph in wanted)

    def write_missing(self, wanted: Sequence[Graph], progress: Progress) -> tuple[Written, ...]:
        """Write the graphs that are not there; whole ones of this model stay, whatever their form.

        Raises:
            OutputError: Something else is there.
        """
        missing = [graph for graph in wanted if not self._is_there(graph)]
        for graph in wanted:
            if graph not in missing:
                progress.note(f"ONNX {graph.folder(self._parent)}: up to date.")
        return self.write(missing, progress)

    def _is_there(self, graph: Graph) -> bool:
        from mtl_export.bundle.manifest import damage, read_manifest

        folder = graph.folder(self._parent)
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is None or damage(folder, manifest):
            return False
        recipe = manifest.recipe
        return recipe.sources.get("checkpoint_sha256") == self._model.checkpoint.sha256 and (
            recipe.options.get("image_size") == self._model.described.image_size
        )

    def _write(self, graph: Graph, progress: Progress) -> Written:
        from mtl_export.bundle.manifest import FileEntry
        from mtl_export.bundle.output import output_folder
        from mtl_export.dense.export import write_dense_graph

        started = perf_counter()
        names = [task.name for task in graph.tasks]
        progress.begin(f"onnx: {graph.name}")
        options: dict[str, OptionValue] = {"layout": graph.layout, "served": names}
        options |= {"opset": self._form.opset, "postprocess": self._is_postprocessed}
        with output_folder(
            graph.folder(self._parent),
            recipe=recipe("onnx", self._model, options),
            force=self._force,
            estimated_size_bytes=_size_bytes(self._model),
        ) as plan:
            if not plan.up_to_date:
                files = write_dense_graph(
                    self._model, names, plan.folder, graph.layout, opset=self._form.opset,
                    is_postprocessed=self._is_postprocessed,
                )  # fmt: skip
                plan.known.update(
                    {name: FileEntry(one.sha256, one.size_bytes) for name, one in files.items()}
                )
        return Written.from_plan(plan, names, perf_counter() - started)


def refuse_uncalibrated(
    model: DenseModel, wanted: Sequence[Graph], onnx_folder: Path, number: str
) -> None:
    """Refuse quantised engines whose graphs ``mtl-export calibrate`` has not written.

    Raises:
        UsageError: They are missing, or of another checkpoint.
    """
    from mtl_export.bundle.manifest import read_manifest

    for graph in wanted:
        manifest = read_manifest(graph.folder(onnx_folder))
        found = manifest.recipe.sources.get("checkpoint_sha256") if manifest else None
        if found != model.checkpoint.sha256:
            state = "is of another checkpoint" if found else "is missing"
            raise UsageError(
                f"--quantize {number}: {graph.folder(onnx_folder)} {state}",
                expected="the quantised graphs of this checkpoint",
                fix=f"Run mtl-export calibrate --quantize {number} first",
            )


def _size_bytes(model: DenseModel) -> int:
    return FOLDER_BYTES_MORE + sum(one.size_bytes for one in model.stored.values())
