"""What a graph's file says of itself, and what it holds, against the checkpoint: no run needed.

task table       the metadata names the checkpoint's tasks: names, ids, labels, kinds
stored tensors   each task's slice of every stack is the checkpoint's, bit for bit in the
graph's dtype
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import AdapterError, CheckpointError, GraphError, LinkedDataError, shortened
from mtl_export.graph.opened import open_graph
from mtl_export.graph.stacks_on_disk import Stack, stacks_of
from mtl_export.graph.task_slices import is_slice, new_slice
from mtl_export.parity.report import Cell
from mtl_export.runtime.ort import onnx_metadata, task_table

TABLE, STORED = "task table", "stored tensors"


def table_cell(cell: Cell, path: Path, tasks: Sequence[Task]) -> Cell:
    """Return the cell on the metadata of an ONNX file.

    Args:
        cell: Says whose it is; ``passed``.
        path: The ONNX file.
        tasks: The tasks it is to serve.
    """
    metadata = onnx_metadata(path)
    try:
        found = task_table(metadata)
    except CheckpointError as error:
        return cell.judged(TABLE, error.problem)
    problems = [] if len(found) == len(tasks) else [f"{len(found)} tasks, not {len(tasks)}"]
    for own, task in zip(found, tasks, strict=False):
        problems += task_differences(own, task, ("name", "index", "labels", "kind"))
    return cell.judged(TABLE, *problems)


def task_differences(found: Task, task: Task, keys: Sequence[str]) -> list[str]:
    """Return in which of its fields a graph's task is not the checkpoint's."""
    return [
        f"{key} of {task.name} is {getattr(found, key)!r}, not {getattr(task, key)!r}"
        for key in keys
        if getattr(found, key) != getattr(task, key)
    ]


def stored_cell(
    cell: Cell,
    path: Path,
    adapters: AdapterSet,
    ids: Mapping[int, int] | None = None,
    task_count: int = 0,
) -> Cell:
    """Return the cell on the stacks of a single graph.

    Args:
        cell: Says whose it is; ``passed``.
        path: The ONNX file.
        adapters: What it was made from.
        ids: The graph's ids by the checkpoint's, of the tasks looked at; None: all, the same.
        task_count: Tasks in the graph, beside ``ids``.
    """
    if ids is None:
        ids, task_count = {task.index: task.index for task in adapters.tasks}, len(adapters.tasks)
    try:
        stacks = stacks_of(open_graph(path), task_count)
        known = [stack for stack in stacks if stack.part not in {"table", "starts", "slots"}]
        if not known:
            return cell.not_run(STORED, "it holds no stacks of tasks")
        problems = [
            f"{stack.module}.{stack.part} of {task.name}"
            for stack in known
            for task in adapters.tasks
            if task.index in ids and not _is_right(stack, adapters, task, ids[task.index])
        ]
    except (LinkedDataError, ValueError, OSError) as error:
        return cell.not_run(STORED, str(error))
    except GraphError as error:
        return cell.judged(STORED, str(error))
    wrong = f"not the checkpoint's: {shortened(problems)}" if problems else ""
    return cell.judged(STORED, wrong)


def _is_right(stack: Stack, adapters: AdapterSet, task: Task, index: int) -> bool:
    try:
        own = new_slice(stack, adapters, task)
    except AdapterError:
        return True  # the base's own, which the checkpoint does not hold
    stored = stack.slice_of(index)
    if own.ndim != stored.ndim or own.shape[-1] > stored.shape[-1]:
        return False
    return own.shape[:-1] == stored.shape[:-1] and is_slice(stack, own, stored)
