"""The verbs for a Swin with task streams: the same commands, folders and records.

Its file is the whole model, so nothing is bound to a base; every image is answered by every task,
so nothing is routed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from mtl_export.api import sources
from mtl_export.api.graph_form import GRAPH_DTYPE, Form
from mtl_export.api.progress import Progress
from mtl_export.api.settings import Settings
from mtl_export.api.written import Written
from mtl_export.errors import UsageError
from mtl_export.names import LAYOUTS, PER_TASK, SINGLE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        if value is not None:
            raise UsageError(
                f"{words}: {place} holds a whole model, heads and all",
                expected=f"no {words}, because nothing of it would be read",
                fix=f"Leave out {words}",
            )
    model = open_dense(sources.open_settings_checkpoint(settings))
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
    digest = {"checkpoint_sha256": model.checkpoint.sha256}
    return Recipe(command, {**given, **options}, digest, VERSION)


def folds(model: DenseModel) -> list[dict[str, object]]:
    """Return what becomes of each adapted layer, as JSON's types.

    ``layer``; ``folds`` (what goes into one weight); ``stays`` (what remains beside it, empty
    where nothing does) and ``ranks`` (those of the tasks' matrices that remain).
    """
    from mtl_export.adapters.mtlora_swin import layer_folds

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
        results.append(Written.from_plan(plan, [task.name], perf_counter() - started))
    return tuple(results)


@dataclass(frozen=True)
class DenseGraph:
    """One graph to write.

    Attributes:
        tasks: Names, in the order of the outputs.
        layout: ``single-graph`` or ``per-task``.
        folder: Where it goes.
    """

    tasks: tuple[str, ...]
    layout: str
    folder: Path

    @property
    def name(self) -> str:
        """Return its name for people."""
        return self.tasks[0] if self.layout == PER_TASK else "single graph"


def wanted_graphs(
    model: DenseModel, settings: Settings, layout: str | None, parent: Path
) -> list[DenseGraph]:
    """Return the graphs that the options ask for.

    Raises:
        UsageError: A single graph of some tasks only, a layout that does not exist, or no task.
        TaskNotFoundError: A name is unknown.
    """
    tasks = sources.selected_tasks(settings, model.tasks)
    names = tuple(task.name for task in tasks)
    layout = layout or (SINGLE_GRAPH if settings.all_tasks else PER_TASK)
    layouts = LAYOUTS if layout == "both" else (layout,)
    if not set(layouts) <= set(LAYOUTS):
        raise UsageError(
            f"--layout {layout}: {model.checkpoint.path} takes images and no adapters",
            expected=f"{' or '.join(LAYOUTS)}",
            fix=f"Pass --layout {SINGLE_GRAPH}",
        )
    if SINGLE_GRAPH in layouts and len(tasks) < len(model.tasks):
        raise UsageError(
            f"--layout {layout}: only {', '.join(names)} asked for",
            expected="--all-tasks, because that graph answers every task of the checkpoint",
            fix="Pass --all-tasks, or --layout per-task",
        )
    graphs = [DenseGraph(names, SINGLE_GRAPH, parent)] if SINGLE_GRAPH in layouts else []
    if PER_TASK in layouts:
        graphs += [DenseGraph((name,), PER_TASK, parent / name) for name in names]
    return graphs


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


def export(
    model: DenseModel,
    graphs: Sequence[DenseGraph],
    form: Form,
    settings: Settings,
    progress: Progress,
    *,
    is_postprocessed: bool = False,
) -> tuple[Written, ...]:
    """Write the graphs."""
    from mtl_export.bundle.manifest import FileEntry
    from mtl_export.bundle.output import output_folder
    from mtl_export.dense.export import write_dense_graph
    from mtl_export.dense.kinds import refuse_unknown

    if is_postprocessed:
        refuse_unknown(tuple(task.name for task in model.tasks))
    progress.expect(len(graphs))
    results = []
    for graph in graphs:
        started = perf_counter()
        progress.begin(f"onnx: {graph.name}")
        options: dict[str, OptionValue] = {"layout": graph.layout, "served": list(graph.tasks)}
        options |= {"opset": form.opset, "postprocess": is_postprocessed}
        with output_folder(
            graph.folder,
            recipe=recipe("onnx", model, options),
            force=settings.force,
            estimated_size_bytes=_size_bytes(model),
        ) as plan:
            if not plan.up_to_date:
                files = write_dense_graph(
                    model, graph.tasks, plan.folder, graph.layout, opset=form.opset,
                    is_postprocessed=is_postprocessed,
                )  # fmt: skip
                plan.known.update(
                    {name: FileEntry(one.sha256, one.size_bytes) for name, one in files.items()}
                )
        results.append(Written.from_plan(plan, graph.tasks, perf_counter() - started))
    return tuple(results)


def _size_bytes(model: DenseModel) -> int:
    return FOLDER_BYTES_MORE + sum(one.size_bytes for one in model.stored.values())
