"""What all passes share that let each row pick its own task's tensors.

``ids`` is ``task_ids`` with every id outside [0, T) replaced by T, and slice T of each
stack is NaN: a bad id can never look like an answer. Left alone, TensorRT's Gather would
return zeros for it, which is the base model's own output.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, module_of, replace_marker
from mtl_export.graph.passes.stacks import with_poison
from mtl_export.graph.passes.weights import add_initializer

# [B, I] and [B, S, I]
RANKS = (2, 3)


class RoutePass(ir.passes.InPlacePass):
    """Replace the markers of some kinds by nodes that gather each row's task.

    A subclass names its ``op_types`` and implements ``lower``.
    """

    op_types: ClassVar[frozenset[str]]

    def __init__(self, bound: BoundModel) -> None:
        super().__init__()
        self._bound = bound
        self._used: set[str] = set()

    @abstractmethod
    def lower(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record the nodes that take the marker's place; return its output."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the input ``task_ids``, if it is not there, and lower this pass's markers."""
        found = markers(model, self.op_types)
        opset = model.opset_imports[""]
        ids = guarded_ids(model.graph, len(self._bound.adapters.tasks))
        self._used.clear()
        for node in found:
            ops = tape.Tape(node.graph)
            replace_marker(node, ops, self.lower(model.graph, node, ids, ops))
        for name in sorted(self._used):
            function = functions.FUNCTIONS[name](opset)
            model.functions[function.identifier()] = function
        model.opset_imports[names.DOMAIN] = names.DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no marker of these kinds is left."""
        ensure_no_markers(model, self.op_types)

    def vectors(
        self,
        graph: ir.Graph,
        module: str,
        name: str,
        rows: Array,
        x: ir.Value,
        ids: ir.Value,
        ops: tape.Tape,
    ) -> ir.Value:
        """Return each row's own vector of ``rows`` ``[T, O]``, to broadcast over ``x``."""
        stack = self.stack(graph, module, name, with_poison(rows))
        function = functions.TASK_VECTOR_ROWS if rank(x) == 2 else functions.TASK_VECTORS
        return self.custom(function, [ids, stack], names.value(module, name), ops)

    def custom(self, function: str, inputs: list[ir.Value], name: str, ops: tape.Tape) -> ir.Value:
        """Record a call of one of ``functions``."""
        self._used.add(function)
        return ops.op(function, inputs, domain=names.DOMAIN, name=name)

    def stack(self, graph: ir.Graph, module: str, name: str, values: Array) -> ir.Value:
        """Return ``values`` as an initializer of ``module``."""
        return add_initializer(graph, names.part(module, name), values.shape, lambda: values)


def guarded_ids(graph: ir.Graph, task_count: int) -> ir.Value:
    """Return ``ids``, after adding the input ``task_ids`` int64 [batch] if it is not there."""
    last = "task_ids/guarded"
    for node in graph:
        if node.name == last:
            return node.outputs[0]
    task_ids = ir.Value(
        name=names.TASK_IDS,
        shape=ir.Shape([names.BATCH]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    graph.inputs.append(task_ids)
    ops = tape.Tape()
    zero = ops.op("Constant", [], {"value_int": 0}, name="task_ids/zero")
    count = ops.op("Constant", [], {"value_int": task_count}, name="task_ids/count")
    low = ops.op("GreaterOrEqual", [task_ids, zero], name="task_ids/at_least_zero")
    high = ops.op("Less", [task_ids, count], name="task_ids/below_count")
    known = ops.op("And", [low, high], name="task_ids/known")
    ids = ops.op("Where", [known, task_ids, count], name=last)
    name_values(ops)
    graph.insert_before(graph[0], ops.nodes)
    return ids


def name_values(ops: tape.Tape, result: ir.Value | None = None) -> None:
    """Name the recorded values, ``result`` aside, after the nodes that make them."""
    for node in ops.nodes:
        if node.outputs[0] is not result:
            node.outputs[0].name = f"{node.name}_value"


def input_of(node: ir.Node) -> ir.Value:
    """Return what a marker works on."""
    x = node.inputs[0]
    if x is None:
        raise ValueError(f"marker {node.name} has no input")
    return x


def rank(x: ir.Value) -> int:
    """Return the number of dimensions, 0 where it is unknown."""
    return len(x.shape) if x.shape is not None else 0


def refuse_unknown_rows(node: ir.Node) -> None:
    """Refuse a marker whose input's rows are not those of the batch.

    Raises:
        GraphError: Its first dimension is not ``batch``.
    """
    x = input_of(node)
    first = x.shape[0] if x.shape is not None and rank(x) in RANKS else None
    if not isinstance(first, ir.SymbolicDim) or first.value != names.BATCH:
        raise GraphError(
            where=module_of(node),
            found=f"its input has shape {x.shape}",
            expected=f"[{names.BATCH}, ...] with {' or '.join(map(str, RANKS))} dimensions",
            why="every row must be told its task",
            fix="Export this model per task: --layout per-task",
        )
