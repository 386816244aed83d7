"""The exported graphs that are to be quantised, and which cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api import sources
from mtl_export.api.edited_graph import refuse_to_quantise
from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.errors import UsageError, shortened
from mtl_export.names import LOGITS, PER_TASK, SINGLE_GRAPH

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export_calibration.measure import ExportedGraph

BOTH = "both"


def refuse_parts(bound: BoundModel, layout: str) -> None:
    """Refuse a model that runs as several graphs, or has answers that are not logits.

    Args:
        bound: The model.
        layout: One of ``LAYOUTS``, or ``BOTH``.

    Raises:
        UsageError: It generates tokens, or its tasks' heads differ in kind.
    """
    model_class = bound.adapters.model_class
    if is_causal_lm(model_class) or is_seq2seq(model_class, bound.base.config):
        raise UsageError(
            f"model class {model_class}: it generates tokens, by several graphs that hand on keys "
            "and values",
            expected=(
                "a model of one graph, because what quantising costs is counted on the decisions "
                "of one run"
            ),
            fix="Quantise it with a tool for language models",
        )
    outputs = dict.fromkeys(task.output for task in bound.adapters.tasks if task.output)
    bare = [task.name for task in bound.adapters.tasks if task.output and not task.labels]
    if bare:
        raise UsageError(
            f"task {bare[0]}: it has no head",
            expected="tasks with logits, because what quantising costs is told by them",
            fix="Quantise a checkpoint without it",
        )
    if outputs and layout != PER_TASK:
        raise UsageError(
            f"the tasks' heads: they differ in kind: {shortened(outputs)}",
            expected=(
                "one output logits, because what quantising a single graph costs is told by it"
            ),
            fix="Pass --layout per-task: each task's own graph has logits",
        )


def targets_of(bound: BoundModel, parent: Path, layout: str) -> list[ExportedGraph]:
    """Return the graphs of one layout, there or not."""
    from mtl_export_calibration.measure import ExportedGraph

    if layout == SINGLE_GRAPH:
        return [ExportedGraph(parent, None)]
    return [ExportedGraph(parent / task.name, task) for task in bound.adapters.tasks]


def refuse_stale(bound: BoundModel, targets: Sequence[ExportedGraph]) -> None:
    """Refuse graphs that were exported from another model, or edited since.

    Raises:
        UsageError: There are some.
    """
    from mtl_export.runtime.ort import onnx_metadata

    for target in targets:
        if not target.path.is_file():
            continue
        if target.task is None:
            refuse_to_quantise(target.folder)
        other = sources.other_source(bound, onnx_metadata(target.path))
        if other:
            raise UsageError(
                f"{target.path}: {other}",
                expected=(
                    "a graph of this checkpoint and base, because what it is quantised to would "
                    "be taken for this checkpoint's"
                ),
                fix=f"Export it again: {_export_command(target.task is not None)} --force",
            )


def refuse_form(target: ExportedGraph) -> None:
    """Refuse a graph without logits, or in which rows do not pick their own tasks.

    Raises:
        UsageError: It has none, or takes one task for the whole batch.
    """
    from mtl_export.checkpoint.files.onnx_file import read_onnx

    model = read_onnx(target.path)
    outputs = [value.name for value in model.graph.output]
    if LOGITS not in outputs:
        raise UsageError(
            f"{target.path}: outputs {shortened(outputs)}",
            expected=f"an output {LOGITS}, because what quantising costs is told by it",
            fix="Calibrate a model with heads",
        )
    metadata = {one.key: one.value for one in model.metadata_props}
    if target.task is None and metadata.get("mtl_export.task_input") == "scalar":
        raise UsageError(
            f"{target.path}: it takes one task for the whole batch",
            expected=(
                "a graph in which each row picks its task, because tasks are mixed in the batches "
                "that it is judged on"
            ),
            fix="Export it with --task-input rows, or pass --layout per-task",
        )


def nothing_exported(parent: Path, layout: str) -> UsageError:
    """Return the refusal of a folder that holds no graph of ``layout``."""
    return UsageError(
        f"{parent}: no exported graph",
        expected=(
            "model.onnx, or TASK/model.onnx, because it is the exported graph that is quantised"
        ),
        fix=f"Run {_export_command(layout == PER_TASK)} first",
    )


def _export_command(per_task: bool) -> str:
    return f"mtl-export onnx --all-tasks{' --layout per-task' if per_task else ''}"
