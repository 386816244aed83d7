"""Faults of routing: rows that get another task's tensors, or answers nobody may give."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.stacks_on_disk import set_task_count
from tests.benchmarks.gate.fault import ALL, Fault
from tests.benchmarks.gate.project import Project, edit_graphs, edit_values, set_values
from tests.benchmarks.gate.weights import HEADS, LLAMA, ROBERTA, WHERE, only, put

IDS, GUARDED = "task_ids", "task_ids/guarded_value"


def constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Add an initializer."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def found(model: ir.Model, name: str) -> ir.Value:
    """Return the value called ``name``."""
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.name == name:
            return value
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def reread(
    model: ir.Model, value: ir.Value, make: Callable[[], list[ir.Node]], readers: list[ir.Node]
) -> None:
    """Put nodes behind ``value``: ``readers`` read what the last of them gives."""
    nodes = make()
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(producer, nodes)
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(index, nodes[-1].outputs[0])


def rerouted(make: Callable[[ir.Model, ir.Value], list[ir.Node]]) -> Callable[[Project], None]:
    """Return a fault: every reader of ``task_ids`` reads what ``make`` makes of them."""

    def change(model: ir.Model) -> None:
        ids = found(model, IDS)
        readers = [use.node for use in ids.uses()]
        reread(model, ids, lambda: make(model, ids), readers)

    return lambda project: edit_graphs(project.out / "onnx", change)


def next_task(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """Every row is answered by the task behind its own; unknown ids stay unknown."""
    table = constant(model, "fault/table", np.array([1, 2, 0, 3, -1], np.int64))
    low, high = (constant(model, f"fault/{n}", np.array(n, np.int64)) for n in (-1, 3))
    kept = ir.node("Clip", [ids, low, high])
    return [kept, ir.node("Gather", [table, kept.outputs[0]], {"axis": 0})]


def traced_ids(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """The ids of the trace, 0 1 2 0 1 2 ..., whatever is asked."""
    zero, one = (constant(model, f"fault/{n}", np.array(n, np.int64)) for n in (0, 1))
    three = constant(model, "fault/3", np.array(3, np.int64))
    shape = ir.node("Shape", [ids])
    rows = ir.node("Squeeze", [shape.outputs[0]])
    numbers = ir.node("Range", [zero, rows.outputs[0], one])
    return [shape, rows, numbers, ir.node("Mod", [numbers.outputs[0], three])]


def first_of_batch(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """The first row's id, for every row."""
    zero = constant(model, "fault/0", np.array([0], np.int64))
    shape = ir.node("Shape", [ids])
    first = ir.node("Gather", [ids, zero], {"axis": 0})
    return [shape, first, ir.node("Expand", [first.outputs[0], shape.outputs[0]])]


def reversed_beyond_three(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """The ids as they are in batches of up to three rows, the traced size; then in reverse."""
    minus = constant(model, "fault/minus", np.array([-1], np.int64))
    far = constant(model, "fault/far", np.array([-(2**31)], np.int64))
    axis = constant(model, "fault/axis", np.array([0], np.int64))
    three = constant(model, "fault/3", np.array([3], np.int64))
    shape = ir.node("Shape", [ids])
    few = ir.node("LessOrEqual", [shape.outputs[0], three])
    turned = ir.node("Slice", [ids, minus, far, axis, minus])
    return [shape, few, turned, ir.node("Where", [few.outputs[0], ids, turned.outputs[0]])]


def without_guard(
    number: Callable[[ir.Model, ir.Value], list[ir.Node]],
) -> Callable[[Project], None]:
    """Return a fault: what unknown ids are turned into."""

    def change(model: ir.Model) -> None:
        guarded, ids = found(model, GUARDED), found(model, IDS)
        readers = [use.node for use in guarded.uses()]
        nodes = number(model, ids)
        guard = guarded.producer()
        assert guard is not None
        model.graph.insert_after(guard, nodes)
        for reader in readers:
            for index, read in enumerate(reader.inputs):
                if read is guarded:
                    reader.replace_input_with(index, nodes[-1].outputs[0])

    return lambda project: edit_graphs(project.out / "onnx", change)


def clipped(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """The nearest task answers for an unknown id."""
    low, high = (constant(model, f"fault/{n}", np.array(n, np.int64)) for n in (0, 2))
    return [ir.node("Clip", [ids, low, high])]


def narrowed(model: ir.Model, ids: ir.Value) -> list[ir.Node]:
    """Ids lose their upper half, as where a runtime keeps them in 32 bits; then the guard."""
    back = ir.node("Cast", [ids], {"to": ir.DataType.INT32})
    wide = ir.node("Cast", [back.outputs[0]], {"to": ir.DataType.INT64})
    low, high = (constant(model, f"fault/{n}", np.array(n, np.int64)) for n in (-1, 3))
    kept = ir.node("Clip", [wide.outputs[0], low, high])
    table = constant(model, "fault/table", np.array([0, 1, 2, 3, 3], np.int64))
    return [back, wide, kept, ir.node("Gather", [table, kept.outputs[0]], {"axis": 0})]


def base_answers(project: Project) -> None:
    """An unknown id gets cores of zero, so that the base answers, under the first task's head."""

    def change(model: ir.Model) -> None:
        for name in list(model.graph.initializers):
            if name.endswith(".core"):
                set_values(model, name, only(3, np.zeros_like))
            if name.endswith((".weights", ".biases")):
                set_values(model, name, lambda value: np.concatenate([value[:3], value[:1]]))

    edit_graphs(project.out / "onnx", change)


def one_more_task(project: Project) -> None:
    """The number of tasks is one too large, and there are tensors for it: the last task's."""

    def change(model: ir.Model) -> None:
        set_task_count(model, 4)
        for name in list(model.graph.initializers):
            if name.endswith(".core"):
                set_values(model, name, lambda v: np.concatenate([v[:3], v[2:]]))

    edit_graphs(project.out / "onnx", change)


def leak(project: Project) -> None:
    """One task's cores hold a thousandth of another's."""

    def change(value: Array) -> Array:
        value[0] += np.float32(1e-3) * value[2]
        return value

    edit_values(project.out / "onnx", {f"{LLAMA}.mlp.down_proj.core": change})


def layers_swapped(project: Project) -> None:
    """Two layers of one shape have each other's stacks."""

    def change(model: ir.Model) -> None:
        names = [f"{ROBERTA[:-1]}{layer}.attention.self.value.core" for layer in (0, 1)]
        tensors = [model.graph.initializers[name].const_value for name in names]
        for name, tensor in zip(names, reversed(tensors), strict=True):
            assert tensor is not None
            array = tensor.numpy()
            set_values(model, name, put(array))

    edit_graphs(project.out / "onnx", change)


def tasks_renamed(project: Project) -> None:
    """The file's table gives two tasks each other's ids; numbers are right by id."""

    def change(model: ir.Model) -> None:
        table = json.loads(model.metadata_props["mtl_export.tasks"])
        table[0]["name"], table[2]["name"] = table[2]["name"], table[0]["name"]
        model.metadata_props["mtl_export.tasks"] = json.dumps(table)

    edit_graphs(project.out / "onnx", change)


def other_head(project: Project) -> None:
    """The widest task's head, cut to its width, answers for another task."""

    def change(value: Array) -> Array:
        kept = value[2].copy()
        value[2] = value[1]
        value[2][..., 2:] = kept[..., 2:]
        return value

    edit_values(project.out / "onnx", dict.fromkeys(HEADS, change))


def padding_answers(project: Project) -> None:
    """Labels that a task does not have get a logit of 0."""
    edit_values(
        project.out / "onnx",
        {"classifier.out_proj.biases": lambda v: np.where(np.isneginf(v), np.float32(0), v)},
    )


ANSWERED = r"bad task ids.*(answered|error)"
FAULTS = (
    Fault("ids off by one", "roberta", ALL, rerouted(next_task), "task .*error|columns"),
    Fault("ids off by one", "t5", ALL, rerouted(next_task), WHERE),
    Fault("routing frozen at the traced ids", "roberta", ALL, rerouted(traced_ids), "mixed|task"),
    Fault("routing frozen at the traced ids", "llama", ALL, rerouted(traced_ids), "task .*error"),
    Fault("the first row's task for the batch", "llama", ALL, rerouted(first_of_batch),
          "mixed tasks.*error"),
    Fault("routing right at the traced batch size only", "t5", ALL,
          rerouted(reversed_beyond_three), "mixed tasks.*error"),
    Fault("unknown id: the base answers", "roberta", ALL, base_answers, ANSWERED),
    Fault("unknown id: the nearest task answers", "llama", ALL, without_guard(clipped), ANSWERED),
    Fault("unknown id: 2^32 + 1 is 1", "t5", ALL, rerouted(narrowed), ANSWERED),
    Fault("one task too many", "llama", ALL, one_more_task, r"ids \[3\] are answered|stack"),
    Fault("a task leaks into another, 1e-3", "llama", ALL, leak, "task summary.*error"),
    Fault("two layers swapped", "roberta", ALL, layers_swapped, WHERE),
    Fault("names of two tasks swapped in the file", "roberta", ALL, tasks_renamed,
          "ads_rel.*spam|spam.*ads_rel"),
    Fault("one task's head answers for another", "roberta", ALL, other_head, "task spam.*error"),
    Fault("labels a task has not get a logit", "roberta", ALL, padding_answers,
          "columns 2 and up answer"),
)  # fmt: skip
