"""What all passes share that let each row pick its own task's tensors.

``ids`` is ``task_ids`` with every id outside [0, T) replaced by T, and slice T of each
stack is NaN: a bad id can never look like an answer. Left alone, TensorRT's Gather would
return zeros for it, which is the base model's own output. OpenVINO cuts int64 inputs to 32
bits, whereby 2^32 would be task 0; not where they are cast to float, so that ids beyond 2^24 are
found out there.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, rank, replace_marker
from mtl_export.graph.passes.row_view import RowView
from mtl_export.graph.passes.stacks import with_poison
from mtl_export.graph.passes.weights import add_initializer
from mtl_export.names import TASK_IDS

# ``rows``: task_ids [batch]; ``scalar``: task_ids [1], one task for the whole batch.
TaskInput = Literal["rows", "scalar"]
# Whole numbers up to here are exact in float32.
FARTHEST_ID = 2.0**24


class RoutePass(ir.passes.InPlacePass):
    """Replace the markers of some kinds by nodes that gather each row's task.

    A subclass names its ``op_types`` and implements ``lower``.

    Args:
        bound: The adapters.
        task_input: What ``task_ids`` is.
    """

    op_types: ClassVar[frozenset[str]]

    def __init__(self, bound: BoundModel, task_input: TaskInput = "rows") -> None:
        super().__init__()
        self._bound = bound
        self._is_scalar = task_input == "scalar"
        self._used: set[str] = set()

    @abstractmethod
    def lower(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record the nodes that take the marker's place; return its output.

        The marker's input is ``[B, I]`` or ``[B, S, I]`` (ids ``[B, S]``) and ``ids`` ``[B]``;
        or it is anything, and ``ids`` is a scalar.
        """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the input ``task_ids``, if it is not there, and lower this pass's markers."""
        found = markers(model, self.op_types)
        opset = model.opset_imports[""]
        ids = guarded_ids(model.graph, len(self._bound.adapters.tasks), is_scalar=self._is_scalar)
        self._used.clear()
        for node in found:
            ops = tape.Tape(node.graph)
            replace_marker(node, ops, self._lowered(model.graph, node, ids, ops))
        for name in sorted(self._used):
            function = functions.FUNCTIONS[name](opset)
            model.functions[function.identifier()] = function
        model.opset_imports[names.DOMAIN] = names.DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=bool(found))

    def _lowered(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record one marker, its input seen with one row for each row of the batch."""
        if self._is_scalar:
            return self.lower(graph, node, ids, ops)
        view = RowView(node, ids, ops)
        node.replace_input_with(0, view.x)
        y = view.back(self.lower(graph, node, ids, ops))
        name_values(ops, y)
        return y

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
        is_vector = self._is_scalar or rank(x) == 2
        function = functions.TASK_VECTOR_ROWS if is_vector else functions.TASK_VECTORS
        return self.custom(function, [ids, stack], names.value(module, name), ops)

    def custom(self, function: str, inputs: list[ir.Value], name: str, ops: tape.Tape) -> ir.Value:
        """Record a call of one of ``functions``."""
        self._used.add(function)
        return ops.op(function, inputs, domain=names.DOMAIN, name=name)

    def stack(self, graph: ir.Graph, module: str, name: str, values: Array) -> ir.Value:
        """Return ``values`` as an initializer of ``module``."""
        return add_initializer(graph, names.part(module, name), values.shape, lambda: values)


def guarded_ids(graph: ir.Graph, task_count: int, *, is_scalar: bool = False) -> ir.Value:
    """Return ``ids``, after adding the input ``task_ids`` if it is not there.

    Args:
        graph: Gets it as its last input.
        task_count: T.
        is_scalar: ``task_ids`` is int64 [1] and the result a scalar; else both are [batch].
    """
    last = "task_ids/one" if is_scalar else "task_ids/guarded"
    for node in graph:
        if node.name == last:
            return node.outputs[0]
    task_ids = ir.Value(
        name=TASK_IDS,
        shape=ir.Shape([1 if is_scalar else names.BATCH]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    graph.inputs.append(task_ids)
    ops = tape.Tape()
    zero = ops.op("Constant", [], {"value_int": 0}, name="task_ids/zero")
    count = ops.op("Constant", [], {"value_int": task_count}, name="task_ids/count")
    low = ops.op("GreaterOrEqual", [task_ids, zero], name="task_ids/at_least_zero")
    high = ops.op("Less", [task_ids, count], name="task_ids/below_count")
    known = ops.op("And", [low, high], name="task_ids/in_range")
    size = ops.op("Cast", [task_ids], {"to": ir.DataType.FLOAT}, name="task_ids/float")
    size = ops.op("Abs", [size], name="task_ids/size")
    limit = ops.op("Constant", [], {"value_float": FARTHEST_ID}, name="task_ids/limit")
    near = ops.op("Less", [size, limit], name=names.NEAR)
    known = ops.op("And", [known, near], name="task_ids/known")
    ids = ops.op("Where", [known, task_ids, count], name="task_ids/guarded")
    if is_scalar:
        ids = ops.op("Squeeze", [ids], name=last)
    name_values(ops)
    graph.insert_before(graph[0], ops.nodes)
    return ids


def name_values(ops: tape.Tape, result: ir.Value | None = None) -> None:
    """Name the recorded values, ``result`` aside, after the nodes that make them."""
    for node in ops.nodes:
        if node.outputs[0] is not result:
            node.outputs[0].name = f"{node.name}_value"
