"""Lower every marker to a layer that serves all tasks, each row its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience, tape

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import NO_LABEL, Head, LayerAdapter
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, module_of
from mtl_export.graph.passes.weights import add_initializer


class RouteTasksPass(ir.passes.InPlacePass):
    """Replace the markers by layers that gather each row's task.

    Cases
        1. ``TaskLinear(x, W, b)``, x [B, S, I]  ->
           ``Add(Add(MatMul(x, W^T), TaskDelta(x, ids, down, core, up)), b)``; the bias comes
           last because runtimes fuse ``Add(bias)`` into the GELU or LayerNorm that follows.
        2. the same with x [B, I]: ``TaskDeltaRows``
        3. ``TaskLinear`` without bias: the last Add is left out.
        4. ``TaskHead(x)``, x [B, I]  ->  ``TaskHeadRows(x, ids, weights, biases)``, as wide as
           the widest head; columns a task does not have are -inf.
        5. x whose first dimension is not the graph's ``batch``: refused, for its rows
           could not be told apart.

    ``ids`` is ``task_ids`` with every id outside [0, T) replaced by T, and row T of each
    stack is NaN: a bad id can never look like an answer. Left alone, TensorRT's Gather
    would return zeros for it, which is the base model's own output.
    """

    def __init__(self, bound: BoundModel) -> None:
        super().__init__()
        self._bound = bound

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the input ``task_ids`` and lower all markers of ``model``."""
        found = markers(model)
        opset = model.opset_imports[""]
        ids = self._guarded_ids(model.graph)
        used: set[str] = set()
        for node in found:
            _refuse_unknown_rows(node)
            ops = tape.Tape(node.graph)
            lower = self._head if node.op_type == names.MARKER_HEAD else self._linear
            result, function = lower(model.graph, node, ids, ops)
            used.add(function)
            convenience.replace_nodes_and_values(
                node.graph, node, [node], ops.nodes, node.outputs, [result]
            )
        for name in sorted(used):
            function = functions.FUNCTIONS[name](opset)
            model.functions[function.identifier()] = function
        model.opset_imports[names.DOMAIN] = names.DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no marker is left."""
        ensure_no_markers(model)

    def _guarded_ids(self, graph: ir.Graph) -> ir.Value:
        task_ids = ir.Value(
            name=names.TASK_IDS,
            shape=ir.Shape([names.BATCH]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.inputs.append(task_ids)
        ops = tape.Tape()
        zero = ops.op("Constant", [], {"value_int": 0}, name="task_ids/zero")
        count = ops.op(
            "Constant", [], {"value_int": len(self._bound.adapters.tasks)}, name="task_ids/count"
        )
        low = ops.op("GreaterOrEqual", [task_ids, zero], name="task_ids/at_least_zero")
        high = ops.op("Less", [task_ids, count], name="task_ids/below_count")
        known = ops.op("And", [low, high], name="task_ids/known")
        ids = ops.op("Where", [known, task_ids, count], name="task_ids/guarded")
        for node in ops.nodes:
            node.outputs[0].name = f"{node.name}_value"
        graph.insert_before(graph[0], ops.nodes)
        return ids

    def _linear(
        self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape
    ) -> tuple[ir.Value, str]:
        module, x = module_of(node), _x_of(node)
        layer = self._bound.adapters.layers[module]
        weight = self._weight_t(graph, module, layer)
        factors = _factors(graph, module, layer)
        function = functions.TASK_DELTA if _rank(x) == 3 else functions.TASK_DELTA_ROWS
        product = ops.op("MatMul", [x, weight], name=names.value(module, "matmul"))
        delta = ops.op(
            function, [x, ids, *factors], domain=names.DOMAIN, name=names.value(module, "delta")
        )
        y = ops.op("Add", [product, delta], name=names.value(module, "adapted"))
        if len(node.inputs) > 2:
            y = ops.op("Add", [y, node.inputs[2]], name=names.value(module, "add"))
        for added in ops.nodes[:-1]:
            added.outputs[0].name = f"{added.name}_value"
        return y, function

    def _weight_t(self, graph: ir.Graph, module: str, layer: LayerAdapter) -> ir.Value:
        base = self._bound.base_tensor(f"{module}.weight")
        shape = (layer.in_features, layer.out_features)
        return add_initializer(graph, names.weight_t(module), shape, lambda: base.numpy().T)

    def _head(
        self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape
    ) -> tuple[ir.Value, str]:
        module = module_of(node)
        heads = self._bound.adapters.heads[module]
        weights, biases = stacked_heads(heads)
        stacks = [
            add_initializer(graph, names.part(module, "weights"), weights.shape, lambda: weights),
            add_initializer(graph, names.part(module, "biases"), biases.shape, lambda: biases),
        ]
        y = ops.op(
            functions.TASK_HEAD_ROWS,
            [_x_of(node), ids, *stacks],
            domain=names.DOMAIN,
            name=names.value(module, "head"),
        )
        return y, functions.TASK_HEAD_ROWS


def stacked_cores(layer: LayerAdapter) -> Array:
    """Return ``[T + 1, D, U]``: the cores transposed for row vectors, then a row of NaN."""
    poison = np.full((1, *layer.core.shape[1:]), np.nan)
    stack: Array = np.concatenate([layer.core, poison]).transpose(0, 2, 1)
    return stack


def stacked_heads(heads: tuple[Head, ...]) -> tuple[Array, Array]:
    """Return weights ``[T + 1, I, L]`` and biases ``[T + 1, L]``, the last row NaN.

    L is the widest head; a column that a task does not have has weight 0 and bias -inf.
    """
    features = heads[0].weight.shape[1]
    width = max(head.weight.shape[0] for head in heads)
    weights = np.zeros((len(heads) + 1, features, width), np.float32)
    biases = np.full((len(heads) + 1, width), NO_LABEL, np.float32)
    for index, head in enumerate(heads):
        labels = head.weight.shape[0]
        weights[index, :, :labels] = head.weight.T
        biases[index, :labels] = head.bias
    weights[-1], biases[-1] = np.nan, np.nan
    return weights, biases


def _factors(graph: ir.Graph, module: str, layer: LayerAdapter) -> list[ir.Value]:
    cores = stacked_cores(layer)
    return [
        add_initializer(
            graph, names.part(module, "down"), layer.down.T.shape, lambda: layer.down.T
        ),
        add_initializer(graph, names.part(module, "core"), cores.shape, lambda: cores),
        add_initializer(graph, names.part(module, "up"), layer.up.T.shape, lambda: layer.up.T),
    ]


def _x_of(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    if x is None:
        raise ValueError(f"marker {node.name} has no input")
    return x


def _rank(x: ir.Value) -> int:
    return len(x.shape) if x.shape is not None else 0


def _refuse_unknown_rows(node: ir.Node) -> None:
    x = _x_of(node)
    ranks = (2,) if node.op_type == names.MARKER_HEAD else (2, 3)
    first = x.shape[0] if x.shape is not None and _rank(x) in ranks else None
    if not isinstance(first, ir.SymbolicDim) or first.value != names.BATCH:
        raise GraphError(
            where=module_of(node),
            found=f"its input has shape {x.shape}",
            expected=f"[{names.BATCH}, ...] with {' or '.join(map(str, ranks))} dimensions",
            why="every row must be told its task",
            fix="Export this model per task: --layout per-task",
        )
