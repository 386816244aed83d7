"""Add, remove or rename a task of a routed graph, without the base, a trace or torch.

    add       slice T of every stack is the new task's; unknown ids are sent to T + 1
    remove    its slices are cut out; ids of later tasks go down by one, their order stays
    rename    only the task table changes

What other tasks gather stays what it was, bit by bit. A new task whose head is the widest
makes the logits wider: the other tasks' new columns are -inf, as for any absent label. A
removed one leaves the width as it is.

A new task must fit what all tasks share: the same family, base, down- and up-projections,
number for number. What the graph would need besides stacks (trained embeddings, a layer that
no other task adapts, a higher rank than any) is refused: that is another graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mtl_export.adapters.normal_form import NO_LABEL, AdapterSet
from mtl_export.checkpoint.checkpoint import TASK_NAME, Task, task_named, tasks_of
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, UsageError, shortened
from mtl_export.graph.origins import (
    EDITS_KEY,
    ORIGINS_KEY,
    Origin,
    edits_of,
    origins_json,
    origins_of,
)
from mtl_export.graph.stacks_on_disk import (
    Stack,
    as_stored,
    head_outputs,
    set_task_count,
    stacks_of,
    task_count_node,
)
from mtl_export.graph.task_slices import is_slice, new_slice, refuse_misfit, refuse_other_base
from mtl_export.names import CHECKPOINT_KEY, TASKS_KEY

Models = Mapping[str, ir.Model]
# What may stand between a head and the graph's output when logits become wider.
_AS_WIDE = frozenset({"Identity", "Cast"})


def task_table(models: Models) -> tuple[Task, ...]:
    """Return the tasks that the graphs serve, in id order."""
    model = next(iter(models.values()))
    task_count_node(model)
    return tasks_of(model.metadata_props.get(TASKS_KEY, "[]"), TASKS_KEY)


def rename_task(models: Models, name: str, new_name: str) -> tuple[Task, ...]:
    """Give a task another name; return the new table.

    Raises:
        TaskNotFoundError: There is no task ``name``.
        UsageError: ``new_name`` is taken or no name.
    """
    tasks = task_table(models)
    old = task_named(tasks, name, of="graph", option="")
    _refuse_name(new_name, tasks)
    after = tuple(dataclasses.replace(t, name=new_name) if t == old else t for t in tasks)
    _record(models, after, _origins(models), f"rename {name} {new_name}")
    return after


def remove_task(models: Models, name: str) -> tuple[Task, ...]:
    """Cut a task out of all graphs; return the new table.

    Raises:
        TaskNotFoundError: There is no task ``name``.
        UsageError: It is the only one.
    """
    tasks = task_table(models)
    gone = task_named(tasks, name, of="graph", option="").index
    if len(tasks) == 1:
        raise UsageError(
            f"task {name!r}: it is the graph's only task",
            expected="a task beside it",
            fix="Delete the folder instead",
        )
    for model in models.values():
        stacks = stacks_of(model, len(tasks))
        for stack in stacks:
            if stack.part not in {"starts", "table"}:
                _cut(stack, gone)
        for stack in stacks:
            if stack.part == "starts":
                _shorten(stack)
            elif stack.part == "table":
                _compact(stack, next(s for s in stacks if _is_slots_of(s, stack)))
        set_task_count(model, len(tasks) - 1)
    origins = [one for index, one in enumerate(_origins(models)) if index != gone]
    kept = [task for task in tasks if task.index != gone]
    after = tuple(dataclasses.replace(task, index=index) for index, task in enumerate(kept))
    _record(models, after, origins, f"remove {name}")
    return after


def add_task(
    models: Models, adapters: AdapterSet, source: Task, name: str, base_sha256: str = ""
) -> tuple[Task, ...]:
    """Append a task to all graphs; return the new table, or the old one if it is there already.

    Args:
        models: The graphs of one folder.
        adapters: The checkpoint that has the new task.
        source: Which of its tasks.
        name: What it is to be called.
        base_sha256: The base that checkpoint was read with, or names; empty if unknown.

    Raises:
        UsageError: ``name`` is taken or no name.
        AdapterError: The checkpoint does not share what the graph's tasks share, or the task
            has something that the graph has no place for.
        IntegrityError: It was trained on another base.
    """
    tasks = task_table(models)
    refuse_other_base(models, base_sha256)
    by_stem = {stem: stacks_of(model, len(tasks)) for stem, model in models.items()}
    if _holds(models, by_stem, adapters, source, name):
        return tasks
    _refuse_name(name, tasks)
    refuse_misfit(models, by_stem, adapters, source)
    for stem, model in models.items():
        widths = _widths(model, by_stem[stem], adapters, source)
        for stack in by_stem[stem]:
            _append(stack, new_slice(stack, adapters, source), len(tasks))
        _widen_outputs(model, widths)
        set_task_count(model, len(tasks) + 1)
    after = (*tasks, dataclasses.replace(source, name=name, index=len(tasks)))
    sha256 = adapters.checkpoint_sha256
    if _is_of(by_stem, adapters, after):
        _record(models, after, [], "", sha256)
    else:
        origins = _origins(models)
        origins += [Origin(sha256, source.name, source.index)] if origins else []
        _record(models, after, origins, f"add {name} {sha256}")
    return after


def _cut(stack: Stack, gone: int) -> None:
    begin, end = gone * stack.block, (gone + 1) * stack.block
    shape = (stack.shape[0] - stack.block, *stack.shape[1:])
    stack.change(shape, lambda old: np.concatenate([old[:begin], old[end:]]))


def _shorten(starts: Stack) -> None:
    starts.change((starts.shape[0] - 1,), lambda old: old[:-1])


def _is_slots_of(slots: Stack, table: Stack) -> bool:
    return slots.part == "slots" and slots.module == table.module


def _compact(table: Stack, slots: Stack) -> None:
    """Drop the vectors that no task uses any more, the removed one's."""
    used, places = np.unique(slots.tensor.numpy(), return_inverse=True)
    slots.change(slots.shape, lambda _: places.reshape(-1))
    table.change((len(used), *table.shape[1:]), lambda old: old[used])


def _append(stack: Stack, own: Array, task_count: int) -> None:
    """Put one task's slice before the poison, and widen all to the widest head."""
    width = max(stack.shape[-1], own.shape[-1])
    shape = (task_count + 2, *stack.shape[1:-1], width)
    is_bias = stack.part == "biases"

    def widened(rows: Array, fill: float) -> Array:
        room = [(0, 0)] * (rows.ndim - 1) + [(0, width - rows.shape[-1])]
        return np.pad(rows, room, constant_values=fill)

    dtype = stack.tensor.dtype

    def values(old: Array) -> Array:
        fill = NO_LABEL if is_bias else 0.0
        known, poison = old[:task_count], old[task_count:]
        new = as_stored(own[None], dtype)
        return np.concatenate([widened(known, fill), widened(new, fill), widened(poison, np.nan)])

    stack.change(shape, values)


def _widths(
    model: ir.Model, stacks: Sequence[Stack], adapters: AdapterSet, source: Task
) -> dict[str, int]:
    """Return the new label counts of heads that become wider, by module."""
    widths = {}
    for module, _ in head_outputs(model):
        stack = next(s for s in stacks if s.module == module and s.part == "weights")
        labels = len(adapters.heads[module][source.index].bias)
        if labels > stack.shape[-1]:
            widths[module] = labels
    return widths


def _widen_outputs(model: ir.Model, widths: Mapping[str, int]) -> None:
    """Say in the graph how wide the logits are now.

    Raises:
        AdapterError: Something else reads a head that is to become wider.
    """
    for module, output in head_outputs(model):
        value: ir.Value | None = output if module in widths else None
        while value is not None:
            if value.shape is not None:
                value.shape = ir.Shape([*value.shape.dims[:-1], widths[module]])
            users = value.consumers()
            if not users and value.is_graph_output():
                break
            if len(users) != 1 or users[0].op_type not in _AS_WIDE:
                raise AdapterError(
                    f"{module}: the new task's head is wider than any, {widths[module]} outputs",
                    expected=(
                        "at most as many as the widest now, because other nodes of the graph read "
                        "this head"
                    ),
                    fix="Export the graph again with the new task in the checkpoint",
                )
            value = users[0].outputs[0]


def _holds(
    models: Models,
    by_stem: Mapping[str, Sequence[Stack]],
    adapters: AdapterSet,
    source: Task,
    name: str,
) -> bool:
    """Return whether the graphs have a task ``name`` that is ``source``, number for number."""
    own = [task for task in task_table(models) if task.name == name]
    if own != [dataclasses.replace(source, name=name, index=task.index) for task in own] or not own:
        return False
    try:
        refuse_misfit(models, by_stem, adapters, source)
    except AdapterError:
        return False
    return all(
        is_slice(stack, new_slice(stack, adapters, source), stack.slice_of(own[0].index))
        for stacks in by_stem.values()
        for stack in stacks
    )


def _is_of(
    by_stem: Mapping[str, Sequence[Stack]], adapters: AdapterSet, tasks: Sequence[Task]
) -> bool:
    """Return whether the graphs now hold exactly the tasks of ``adapters``."""
    if list(adapters.tasks) != list(tasks):
        return False
    return all(
        is_slice(stack, new_slice(stack, adapters, task), stack.slice_of(task.index))
        for stacks in by_stem.values()
        for stack in stacks
        for task in tasks
    )


def _origins(models: Models) -> list[Origin]:
    """Return where each task came from; empty where an older edit did not write it down."""
    return origins_of(next(iter(models.values())).metadata_props) or []


def _record(
    models: Models,
    tasks: Sequence[Task],
    origins: Sequence[Origin],
    edit: str,
    checkpoint_sha256: str = "",
) -> None:
    """Write the task table, and where the graphs come from now.

    After an edit they come from no checkpoint: the hash becomes that of the old one and the
    edit, so that nothing takes them for what they were. Where their tasks came from stays.
    """
    table = [task.as_entry() for task in tasks]
    for model in models.values():
        properties = model.metadata_props
        edits = [*edits_of(properties), edit]
        derived = f"{properties.get(CHECKPOINT_KEY, '')} {edit}".encode()
        properties[TASKS_KEY] = json.dumps(table)
        properties[CHECKPOINT_KEY] = checkpoint_sha256 or hashlib.sha256(derived).hexdigest()
        properties.pop(ORIGINS_KEY, None)
        if checkpoint_sha256:
            properties.pop(EDITS_KEY, None)
            continue
        properties[EDITS_KEY] = json.dumps(edits)
        if origins:
            properties[ORIGINS_KEY] = origins_json(origins)


def _refuse_name(name: str, tasks: Sequence[Task]) -> None:
    if not TASK_NAME.fullmatch(name) or name in {task.name for task in tasks}:
        is_taken = TASK_NAME.fullmatch(name) is not None
        raise UsageError(
            f"task {name!r}: "
            f"{'the graph has another task of that name' if is_taken else 'that is no task name'}",
            expected=(
                "a new name, of letters, digits, '.', '_' and '-', because the graph's tasks are "
                f"{shortened(task.name for task in tasks)}"
            ),
            fix="Choose another name",
        )


def vector_ids(before: Sequence[Task], after: Sequence[Task], removed: str = "") -> Iterator[int]:
    """Yield each old id's new one, -1 for the removed task; the last is that of unknown ids."""
    kept = 0
    for task in before:
        if task.name == removed:
            yield -1
        else:
            yield kept
            kept += 1
    yield len(after)
