"""Lower every marker to a layer that serves all tasks, each row its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AnyAdapter, OwnAdapter
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, module_of, replace_marker
from mtl_export.graph.passes.stacks import (
    stacked_blocks,
    stacked_cores,
    stacked_heads,
    with_poison,
)
from mtl_export.graph.passes.weights import add_initializer

# [B, I] and [B, S, I]
RANKS = (2, 3)


class RouteTasksPass(ir.passes.InPlacePass):
    """Replace the markers by layers that gather each row's task.

    Cases
        1. ``TaskLinear(x, W, b)``, x [B, S, I]  ->
           ``Add(Add(MatMul(x, W^T), TaskDelta(x, ids, down, core, up)), b)``; the bias comes
           last because runtimes fuse ``Add(bias)`` into the GELU or LayerNorm that follows.
        2. the same with x [B, I]: ``TaskDeltaRows``
        3. ``TaskLinear`` without bias: the last Add is left out.
        4. an adapter whose tasks bring their own factors: ``TaskOwnDelta`` gathers both.
        5. an adapter with gains: ``Mul`` by the gathered gain, before the bias.
        6. a bias that tasks train themselves: the gathered one is added instead of ``b``.
        7. ``TaskHead(x)``, x [B, I]  ->  ``TaskHeadRows(x, ids, weights, biases)``, as wide as
           the widest head; columns a task does not have are -inf. A chain of heads is one
           ``TaskHeadRows`` each.
        8. the same with x [B, S, I], logits for every token: ``TaskHeadTokens``
        9. x whose first dimension is not the graph's ``batch``: refused, for its rows
           could not be told apart.

    ``ids`` is ``task_ids`` with every id outside [0, T) replaced by T, and row T of each
    stack is NaN: a bad id can never look like an answer. Left alone, TensorRT's Gather
    would return zeros for it, which is the base model's own output.
    """

    def __init__(self, bound: BoundModel) -> None:
        super().__init__()
        self._bound = bound
        self._used: set[str] = set()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the input ``task_ids`` and lower all markers of ``model``."""
        found = markers(model)
        opset = model.opset_imports[""]
        ids = self._guarded_ids(model.graph)
        self._used.clear()
        for node in found:
            _refuse_unknown_rows(node)
            ops = tape.Tape(node.graph)
            lower = self._head if node.op_type == names.MARKER_HEAD else self._linear
            result = lower(model.graph, node, ids, ops)
            replace_marker(node, ops, result)
        for name in sorted(self._used):
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

    def _linear(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        module, x = module_of(node), _x_of(node)
        layer = self._bound.adapters.layers[module]
        weight = self._weight_t(graph, module, layer)
        y = ops.op("MatMul", [x, weight], name=names.value(module, "matmul"))
        if self._has_delta(layer):
            delta = self._delta(graph, layer, x, ids, ops)
            y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
        if layer.gain is not None:
            gain = self._vectors(graph, module, "gain", layer.gain, x, ids, ops)
            y = ops.op("Mul", [y, gain], name=names.value(module, "scaled"))
        bias = self._bias(graph, node, module, x, ids, ops)
        if bias is not None:
            y = ops.op("Add", [y, bias], name=names.value(module, "add"))
        for added in ops.nodes:
            if added.outputs[0] is not y:
                added.outputs[0].name = f"{added.name}_value"
        return y

    def _delta(
        self, graph: ir.Graph, layer: AnyAdapter, x: ir.Value, ids: ir.Value, ops: tape.Tape
    ) -> ir.Value:
        rows = _rank(x) == 2
        if isinstance(layer, OwnAdapter):
            stacks = stacked_blocks(layer)
            function = functions.TASK_OWN_DELTA_ROWS if rows else functions.TASK_OWN_DELTA
        else:
            stacks = stacked_cores(layer)
            function = functions.TASK_DELTA_ROWS if rows else functions.TASK_DELTA
        factors = [self._stack(graph, layer.module, name, v) for name, v in stacks.items()]
        return self._call(function, [x, ids, *factors], names.value(layer.module, "delta"), ops)

    def _bias(
        self,
        graph: ir.Graph,
        node: ir.Node,
        module: str,
        x: ir.Value,
        ids: ir.Value,
        ops: tape.Tape,
    ) -> ir.Value | None:
        """Return the traced bias, or a gathered one where tasks differ."""
        adapters = self._bound.adapters
        own = [adapters.replacement(names.bias(module), task.index) for task in adapters.tasks]
        if names.bias(module) in adapters.replaced or all(bias is None for bias in own):
            return node.inputs[2] if len(node.inputs) > 2 else None
        kept = self._bound.base_tensor(names.bias(module)).numpy()
        rows = np.stack([kept if bias is None else bias for bias in own])
        return self._vectors(graph, module, "biases", rows, x, ids, ops)

    def _vectors(
        self,
        graph: ir.Graph,
        module: str,
        name: str,
        rows: Array,
        x: ir.Value,
        ids: ir.Value,
        ops: tape.Tape,
    ) -> ir.Value:
        """Return each row's own vector, shaped to broadcast over ``x``."""
        stack = self._stack(graph, module, name, with_poison(rows))
        function = functions.TASK_VECTOR_ROWS if _rank(x) == 2 else functions.TASK_VECTORS
        return self._call(function, [ids, stack], names.value(module, name), ops)

    def _has_delta(self, layer: AnyAdapter) -> bool:
        return not isinstance(layer, OwnAdapter) or any(b is not None for b in layer.blocks)

    def _call(self, function: str, inputs: list[ir.Value], name: str, ops: tape.Tape) -> ir.Value:
        self._used.add(function)
        return ops.op(function, inputs, domain=names.DOMAIN, name=name)

    def _stack(self, graph: ir.Graph, module: str, name: str, values: Array) -> ir.Value:
        return add_initializer(graph, names.part(module, name), values.shape, lambda: values)

    def _weight_t(self, graph: ir.Graph, module: str, layer: AnyAdapter) -> ir.Value:
        base = self._bound.base_tensor(f"{module}.weight")
        shape = (layer.in_features, layer.out_features)
        return add_initializer(graph, names.weight_t(module), shape, lambda: base.numpy().T)

    def _head(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        weights, biases = stacked_heads(self._bound.adapters.heads[module])
        stacks = [
            self._stack(graph, module, "weights", weights),
            self._stack(graph, module, "biases", biases),
        ]
        name = names.value(module, "head")
        x = _x_of(node)
        function = functions.TASK_HEAD_ROWS if _rank(x) == 2 else functions.TASK_HEAD_TOKENS
        return self._call(function, [x, ids, *stacks], name, ops)


def _x_of(node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    if x is None:
        raise ValueError(f"marker {node.name} has no input")
    return x


def _rank(x: ir.Value) -> int:
    return len(x.shape) if x.shape is not None else 0


def _refuse_unknown_rows(node: ir.Node) -> None:
    x = _x_of(node)
    first = x.shape[0] if x.shape is not None and _rank(x) in RANKS else None
    if not isinstance(first, ir.SymbolicDim) or first.value != names.BATCH:
        raise GraphError(
            where=module_of(node),
            found=f"its input has shape {x.shape}",
            expected=f"[{names.BATCH}, ...] with {' or '.join(map(str, RANKS))} dimensions",
            why="every row must be told its task",
            fix="Export this model per task: --layout per-task",
        )
