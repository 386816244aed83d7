"""The per-task stacks of a routed graph: found by who reads them, changed slice by slice.

T tasks; slice T of every stack is the NaN that unknown ids are sent to. Parts of names, as
``names`` gives them:

    core, downs, ups, weights, biases, gain, absent     [T + 1, ...]
    starts [T + 1], slots [(T + 1) V], table [N, O], and downs [(T + 1) V, R], of an embedding
    of V entries

Values are computed when the file is written: a stack is in memory alone, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.precision import DTYPES, narrowed

NARROW = frozenset(DTYPES.values())
PARTS = frozenset(
    {"core", "downs", "ups", "weights", "biases", "gain", "absent", "starts", "slots", "table"}
)
COUNT_NODE = "task_ids/count"
GUARDED = ("task_ids/one", "task_ids/guarded")
# Which inputs of our functions differ between tasks.
_OWN_INPUTS: dict[str, tuple[int, ...]] = {
    functions.TASK_DELTA: (3,),
    functions.TASK_DELTA_ROWS: (3,),
    functions.TASK_OWN_DELTA: (2, 3),
    functions.TASK_OWN_DELTA_ROWS: (2, 3),
    functions.TASK_HEAD_ROWS: (2, 3),
    functions.TASK_HEAD_TOKENS: (2, 3),
    functions.ONE_TASK_HEAD: (2, 3),
    functions.TASK_VECTORS: (1,),
    functions.TASK_VECTOR_ROWS: (1,),
    functions.TASK_EMBEDDING_DELTA: (2, 3, 4),
    functions.TASK_EMBEDDING_ROWS: (2, 3, 4),
}
HEADS = frozenset({functions.TASK_HEAD_ROWS, functions.TASK_HEAD_TOKENS, functions.ONE_TASK_HEAD})
_SIZES = frozenset({"Shape", "Size"})
# What stands between a stack and its reader.
_PASSED_ON = frozenset({"Concat", "Cast", "Identity"})


@dataclass(frozen=True)
class Stack:
    """One stack.

    Attributes:
        value: Its initializer.
        module: Whose it is.
        part: One of ``PARTS``.
        block: Rows of the tensor that are one task's: 1, or V of an embedding.
    """

    value: ir.Value
    module: str
    part: str
    block: int = 1

    @property
    def tensor(self) -> ir.TensorProtocol:
        """Return the stored values."""
        tensor = self.value.const_value
        if tensor is None:
            raise ValueError(f"{self.value.name} is no initializer")
        return tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return tuple(self.tensor.shape.numpy())

    def slice_of(self, task_index: int) -> Array:
        """Return one task's slice."""
        begin = task_index * self.block
        stored: Array = self.tensor.numpy()
        return stored[begin] if self.block == 1 else stored[begin : begin + self.block]

    def change(self, shape: tuple[int, ...], values: Callable[[Array], Array]) -> None:
        """Replace the values by what ``values`` makes of them, in the same dtype."""
        old = self.tensor
        dtype = old.dtype

        def made() -> ir.TensorProtocol:
            array = np.ascontiguousarray(as_stored(values(old.numpy()), dtype))
            if array.shape != shape:
                raise ValueError(f"{self.value.name}: {array.shape} for {shape}")
            return ir.tensor(array, dtype=dtype, name=self.value.name)

        self.value.const_value = ir.LazyTensor(
            made, dtype=dtype, shape=ir.Shape(shape), name=self.value.name
        )
        self.value.shape = ir.Shape(shape)


def as_stored(values: Array, dtype: ir.DataType) -> Array:
    """Return ``values`` as a graph of this dtype holds them, which is by way of float32.

    What is of that dtype already keeps its bits.
    """
    target = np.dtype(dtype.numpy())
    if values.dtype == target or dtype not in NARROW:
        return values.astype(target)
    return narrowed(values.astype(np.float32), dtype)


def stacks_of(model: ir.Model, task_count: int) -> list[Stack]:
    """Return every per-task stack of ``model``.

    Raises:
        GraphError: A value differs between tasks and is no stack of ours.
    """
    found: dict[str, ir.Value] = {}
    for value in _per_task_values(model):
        for source in _sources(value):
            found[source.name or ""] = source
    wrong = [n for n, v in found.items() if v.const_value is None or _part(n)[1] not in PARTS]
    starts = {
        _part(name)[0]: int(value.const_value.numpy()[1])
        for name, value in found.items()
        if _part(name)[1] == "starts" and value.const_value is not None
    }
    stacks = []
    for name, value in found.items():
        module, part = _part(name)
        block = starts.get(module, 1) if part in {"downs", "slots"} else 1
        stack = Stack(value, module, part, block)
        if name not in wrong and part != "table" and stack.shape[0] != (task_count + 1) * block:
            wrong.append(name)
        stacks.append(stack)
    if wrong:
        raise GraphError(
            f"{model.graph.name}: {wrong[0]} is read by task id, and is no stack of {task_count} "
            "tasks",
            expected=(
                "a graph as mtl-export onnx writes it, because every tensor that tasks do not "
                "share is to be changed"
            ),
            fix="Edit the graph before it is quantised or otherwise changed, or export it again",
        )
    return stacks


def task_count_node(model: ir.Model) -> ir.Node:
    """Return the constant that says how many tasks there are.

    Raises:
        GraphError: There is none: the graph is not a routed one.
    """
    for node in model.graph:
        if node.name == COUNT_NODE and node.op_type == "Constant":
            return node
    raise GraphError(
        f"{model.graph.name}: no input that picks a task",
        expected="a single graph of all tasks, as mtl-export onnx --all-tasks writes it",
        fix="Export the single graph, or merge the task by mtl-export merge",
    )


def set_task_count(model: ir.Model, count: int) -> None:
    """Say how many tasks there are; ids from there on are unknown."""
    node = task_count_node(model)
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(count, dtype=ir.DataType.INT64))


def head_outputs(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """Yield module and output of every head, a call of a function or its nodes."""
    for name, value in model.graph.initializers.items():
        module, part = _part(name)
        if part != "biases" or names.part(module, "weights") not in model.graph.initializers:
            continue
        waiting = list(value.consumers())
        while waiting:
            node = waiting.pop(0)
            if node.op_type in HEADS or node.op_type == "Add":
                yield module, node.outputs[0]
            else:
                waiting += node.outputs[0].consumers()


def _per_task_values(model: ir.Model) -> Iterator[ir.Value]:
    # Ids, and what is computed from them: the ids of a layer's rows, places in an embedding.
    places = {node.outputs[0] for node in model.graph if node.name in GUARDED}
    for node in model.graph.all_nodes():
        positions: tuple[int, ...] = ()
        if node.domain == names.DOMAIN:
            positions = _OWN_INPUTS.get(node.op_type, ())
        elif node.op_type == "Gather" and node.inputs[1] in places:
            positions = (0,)
        elif node.op_type not in _SIZES and not places.isdisjoint(node.inputs):
            places.update(node.outputs)
        for value in [node.inputs[position] for position in positions]:
            if value is not None:
                yield value
                if positions == (0,) and _part(value.name or "")[1] in {"starts", "slots"}:
                    places.update(node.outputs)


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the initializers that ``value`` is made of."""
    node = value.producer()
    if node is None or node.op_type not in _PASSED_ON:
        yield value
        return
    for one in node.inputs:
        if one is not None:
            yield from _sources(one)


def _part(name: str) -> tuple[str, str]:
    module, _, part = name.rpartition(".")
    return module, part
