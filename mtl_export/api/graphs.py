"""Which ONNX graphs a command needs, and one trace that becomes all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from mtl_export.api import edited_graph as edited
from mtl_export.api import sources
from mtl_export.api.graph_form import GRAPH_DTYPE, Form
from mtl_export.api.progress import Progress
from mtl_export.api.settings import Settings
from mtl_export.api.written import UP_TO_DATE, Written
from mtl_export.checkpoint.model_class import has_head
from mtl_export.checkpoint.sentence_pipeline import refuse_other_pooling
from mtl_export.errors import GraphError, UsageError
from mtl_export.names import ADAPTER_INPUT, PER_TASK, SINGLE_GRAPH

if TYPE_CHECKING:
    import onnx_ir as ir

    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import OptionValue
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.graph.external_data import SharedData, WrittenFile
    from mtl_export.graph.trace import TracedModel


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph to write.

    Attributes:
        tasks: The tasks it serves: one, or all.
        layout: ``single-graph``, ``per-task`` or ``adapter-input``.
        is_edited: It is there, its tasks edited: not to be written, but taken as it lies.
    """

    tasks: tuple[Task, ...]
    layout: str
    is_edited: bool = False

    @property
    def task(self) -> Task | None:
        """Return the task whose weights are merged into it, None for the single graph."""
        return self.tasks[0] if self.layout == PER_TASK else None

    @property
    def name(self) -> str:
        """Return its name for people."""
        if self.layout == ADAPTER_INPUT:
            return "graph with adapters"
        return self.task.name if self.task else "single graph"

    def folder(self, parent: Path) -> Path:
        """Return its folder: ``parent`` itself, the task's inside it, or that of adapters."""
        if self.layout == ADAPTER_INPUT:
            return parent / ADAPTER_INPUT
        return parent / self.task.name if self.task else parent


def layout_or_default(settings: Settings, layout: str | None) -> str:
    """Return ``layout``, or that of the tasks asked for: see ``wanted_graphs``."""
    return layout or (SINGLE_GRAPH if settings.all_tasks else PER_TASK)


def wanted_graphs(settings: Settings, layout: str | None, tasks: Sequence[Task]) -> list[Graph]:
    """Return the graphs that the options ask for.

    Args:
        settings: Which tasks.
        layout: What was given; None means the single graph for all tasks, and merged
            graphs for tasks that were named.
        tasks: The checkpoint's tasks.

    Raises:
        UsageError: A single graph of some tasks only, or no task was asked for.
        TaskNotFoundError: A name is unknown.
    """
    selected = sources.selected_tasks(settings, tasks)
    layout = layout_or_default(settings, layout)
    if layout == PER_TASK:
        return [Graph((task,), PER_TASK) for task in selected]
    if len(selected) < len(tasks):
        raise UsageError(
            f"--layout {layout}: only {', '.join(task.name for task in selected)} asked for",
            expected="--all-tasks, because that graph serves every task of the checkpoint",
            fix="Pass --all-tasks, or --layout per-task",
        )
    return [Graph(selected, layout)]


def as_edited(
    graph: Graph, parent: Path, bound: BoundModel, asked: dict[str, tuple[str, str]]
) -> Graph:
    """Return ``graph``; with its tasks as they are now, if it is there and they were edited.

    Raises:
        UsageError: They were, and the graph is not what was asked for; see
            ``edited.tasks_to_build``.
    """
    if graph.layout != SINGLE_GRAPH:
        return graph
    tasks = edited.tasks_to_build(graph.folder(parent), bound, asked)
    return graph if tasks is None else Graph(tasks, SINGLE_GRAPH, is_edited=True)


def refuse_form(layout: str | None, form: Form, dtype: str | None) -> None:
    """Refuse what a graph that takes adapters cannot be.

    Raises:
        UsageError: Half precision, or a form that is not the default.
    """
    asked = [] if dtype in {None, GRAPH_DTYPE} else [f"--dtype {dtype}"]
    asked += [words for words in form.as_words() if not words.startswith("--opset")]
    if layout == ADAPTER_INPUT and asked:
        raise UsageError(
            f"--layout {ADAPTER_INPUT}: {' and '.join(asked)} beside it",
            expected=(
                "fp32, the model's own outputs, and no task_ids, because its task is an adapter "
                "in float32, chosen for each run"
            ),
            fix=f"Leave out {asked[0]}, or use --layout single-graph",
        )


def refuse_idle(settings: Settings, layout: str, form: Form, *, linked: bool = False) -> None:
    """Refuse options that say nothing about graphs of ``layout``.

    Args:
        settings: Say which options were typed.
        layout: What is to be written.
        form: Refused if it was typed; a settings file may mean other graphs.
        linked: ``--link-data`` was typed.

    Raises:
        UsageError: One of them would be ignored.
    """
    idle = {
        "--task-input scalar": (form.task_input == "scalar", "takes no task_ids"),
        "--inline": (form.inline, "has no functions"),
    }
    for words, (is_asked, why) in idle.items():
        parameter = words.split()[0].removeprefix("--").replace("-", "_")
        if is_asked and layout == PER_TASK and parameter in settings.typed:
            raise UsageError(
                f"{words}: graphs of layout {PER_TASK} beside it",
                expected=(
                    f"--all-tasks and --layout {SINGLE_GRAPH}, because a graph with one task "
                    f"merged in {why}"
                ),
                fix=f"Leave out {words.split()[0]}, or export the single graph",
            )
    if linked and layout != PER_TASK:
        raise UsageError(
            f"--link-data: a graph of layout {layout} beside it",
            expected=(
                f"--layout {PER_TASK}, because it is the tasks' folders that have data in common"
            ),
            fix=f"Leave out --link-data, or pass --layout {PER_TASK}",
        )


def refuse_pooled_head(form: Form, model_class: str) -> None:
    """Refuse, before anything is traced, to pool a model that gives no hidden states.

    Raises:
        GraphError: ``--pooling`` with a class that has a head.
    """
    if form.embedding is not None and has_head(model_class):
        raise GraphError(
            f"--pooling: a {model_class}, which answers with its head",
            expected=(
                "a bare encoder, such as AutoModel loads, because a sentence embedding is pooled "
                "from the tokens' hidden states"
            ),
            fix="Leave out --pooling",
        )


class Exporter:
    """Writes graphs of one model; the base is traced once, when the first is needed.

    Args:
        bound: The sources.
        parent: Where the folders go.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what graphs compute in; None is ``fp32``,
            whatever the base's files are in.
        is_linked: Tasks' folders get the data they have in common as hard links.
        form: What the graphs take and give.

    Raises:
        GraphError: The model has nothing of what ``form`` asks for.
    """

    def __init__(
        self,
        bound: BoundModel,
        parent: Path,
        *,
        dtype: str | None = None,
        is_linked: bool = False,
        form: Form | None = None,
    ) -> None:
        self._form = form or Form()
        refuse_pooled_head(self._form, bound.adapters.model_class)
        if self._form.embedding is not None:
            refuse_other_pooling(bound.pipeline, self._form.embedding)
        self._bound, self._parent, self._is_linked = bound, parent, is_linked
        self._dtype = dtype or GRAPH_DTYPE

    def write(self, graph: Graph, steps: Progress, *, force: bool) -> Written:
        """Write ``graph`` unless it is there already.

        Raises:
            OutputError: Something else is there, or the single graph with edits.
        """
        from mtl_export.bundle.manifest import FileEntry
        from mtl_export.bundle.output import output_folder
        from mtl_export.merge.writer import merged_size_bytes

        started = perf_counter()
        names = [task.name for task in graph.tasks]
        folder = graph.folder(self._parent)
        if graph.is_edited:
            steps.begin(f"onnx: {graph.name}, as edited")
            whole = edited.whole_files(folder)
            return Written(folder, tuple(names), UP_TO_DATE, perf_counter() - started, whole)
        if graph.layout == SINGLE_GRAPH:
            edited.refuse_edited(folder, self._bound)
        options: dict[str, OptionValue] = {"layout": graph.layout, "served": names}
        options |= self._form.as_options(is_merged=graph.task is not None)
        if self._dtype != GRAPH_DTYPE:
            options["dtype"] = self._dtype
        recipe = sources.recipe("onnx", self._bound, options)
        steps.begin(f"onnx: {graph.name}")
        with output_folder(
            folder,
            recipe=recipe,
            force=force,
            estimated_size_bytes=merged_size_bytes(self._bound, self._dtype),
        ) as plan:
            if not plan.up_to_date:
                files = self._lower(graph, plan.folder)
                plan.known.update(
                    {name: FileEntry(file.sha256, file.size_bytes) for name, file in files.items()}
                )
        if graph.task and not plan.up_to_date and self._shared:
            self._shared.settle(plan.target)
        return Written.from_plan(plan, names, perf_counter() - started)

    def _lower(self, graph: Graph, folder: Path) -> dict[str, WrittenFile]:
        if graph.layout == ADAPTER_INPUT:
            return self._with_adapters(graph, folder)
        from mtl_export.graph.lower import merged_graph, routed_graph
        from mtl_export.graph.passes.precision import PrecisionPass
        from mtl_export.graph.writer import write_graphs

        form = self._form
        models = {
            part.stem: merged_graph(part, self._bound, graph.task, embedding=form.embedding)
            if graph.task
            else routed_graph(
                part, self._bound, task_input=form.task_input, embedding=form.embedding
            )
            for part in self._parts
        }
        if self._dtype != GRAPH_DTYPE:
            narrow = PrecisionPass(self._dtype)
            models = {stem: narrow(model).model for stem, model in models.items()}
        for model in models.values():
            self._finish(model, graph)
        shared = self._shared if graph.task else None
        return write_graphs(models, self._bound, folder, graph.task, shared)

    def _finish(self, model: ir.Model, graph: Graph) -> None:
        """Expand the functions of ``model`` if that is asked for, and say what is not as usual."""
        from mtl_export.graph.lower import inlined

        if self._form.inline and graph.task is None:
            inlined(model)
        model.metadata_props.update(self._form.as_metadata(is_merged=graph.task is not None))

    def _with_adapters(self, graph: Graph, folder: Path) -> dict[str, WrittenFile]:
        from mtl_export.graph.lower import adapter_input_graph
        from mtl_export.graph.writer import write_graphs
        from mtl_export.runtime.onnx_adapters import adapter_file, write_adapter
        from mtl_export.runtime.ort import load_onnxruntime

        load_onnxruntime()  # before the trace: without it there will be no adapters
        lowered = {part.stem: adapter_input_graph(part, self._bound) for part in self._parts}
        models = {stem: model for stem, (model, _) in lowered.items()}
        for model in models.values():
            self._finish(model, graph)
        files = write_graphs(models, self._bound, folder, None)
        for stem, (_, parameters) in lowered.items():
            for task in graph.tasks:
                values = {p.name: p.value(task.index).astype("float32") for p in parameters}
                write_adapter(folder / adapter_file(stem, task.name), values)
        return files

    @cached_property
    def _shared(self) -> SharedData | None:
        """Return what the tasks' folders have in common; None where there is one task."""
        from mtl_export.graph.external_data import SharedData

        if len(self._bound.adapters.tasks) == 1:
            return None
        return SharedData(is_linked=self._is_linked)

    @cached_property
    def _parts(self) -> tuple[TracedModel, ...]:
        from mtl_export.graph.parts import trace_parts

        return trace_parts(self._bound, self._form.opset)
