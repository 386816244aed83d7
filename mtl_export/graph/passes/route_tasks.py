"""Lower the markers of linear layers and heads to layers that serve all tasks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.normal_form import AnyAdapter, Head, OwnAdapter
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import input_of, module_of, rank
from mtl_export.graph.passes.own_tensors import task_bias, task_linear
from mtl_export.graph.passes.routing import RoutePass, name_values
from mtl_export.graph.passes.stacks import absences, stacked_blocks, stacked_cores, stacked_heads
from mtl_export.graph.passes.weights import add_initializer


class RouteTasksPass(RoutePass):
    """Replace TaskLinear and TaskHead by layers that gather each row's task.

    Cases
        1. ``TaskLinear(x, W, b)``, x [B, S, I]  ->
           ``Add(Add(MatMul(x, W^T), TaskDelta(x, ids, down, core, up)), b)``; the bias comes
           last because runtimes fuse ``Add(bias)`` into the GELU or LayerNorm that follows.
        2. the same with x [B, I]: ``TaskDeltaRows``
        3. ``TaskLinear`` without bias: the last Add is left out.
        4. an adapter whose tasks bring their own factors: ``TaskOwnDelta`` gathers both.
        5. an adapter with gains: ``Mul`` by the gathered gain, before the bias.
        6. a bias that tasks train themselves: the gathered one is added instead of ``b``.
           Without an adapter there is no delta to add.
        7. ``TaskHead(x)``, x [B, I]  ->  ``TaskHeadRows(x, ids, weights, biases)``, as wide as
           the widest head; columns a task does not have are -inf. A chain of heads is one
           ``TaskHeadRows`` each.
        8. the same with x [B, S, I], logits for every token: ``TaskHeadTokens``
        9. ``TaskHead`` of a layer inside the model whose weight tasks trained whole: the same,
           the base's weight for tasks that did not.
        10. x in other rows than the batch's (windows, beams, packed or transposed tokens),
            or with more dimensions: one of the above on a view of it (``row_view``); refused
            where its rows cannot be told apart.
        11. one task for the whole batch: ``TaskDelta`` with a scalar id, whatever the shape
            of x, and ``OneTaskHead``.
        12. a layer that one task adapts and another replaces whole: refused.
        13. ``TaskOutput(x)``  ->  ``Add(x, TaskVectors(ids, absent))``: rows of tasks whose
            answer is another output are -inf, the others keep their bits.
    """

    op_types: ClassVar[frozenset[str]] = frozenset(
        {names.MARKER_LINEAR, names.MARKER_HEAD, names.MARKER_OUTPUT}
    )

    def lower(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record one layer."""
        lower = {
            names.MARKER_LINEAR: self._linear,
            names.MARKER_HEAD: self._head,
            names.MARKER_OUTPUT: self._output,
        }[node.op_type]
        return lower(graph, node, ids, ops)

    def _linear(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        module, x = module_of(node), input_of(node)
        layer = self._bound.adapters.layers.get(module)
        weight = self._weight_t(graph, module)
        y = ops.op("MatMul", [x, weight], name=names.value(module, "matmul"))
        if layer is not None and _has_delta(layer):
            delta = self._delta(graph, layer, x, ids, ops)
            y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
        if layer is not None and layer.gain is not None:
            gain = self.vectors(graph, module, "gain", layer.gain, x, ids, ops)
            y = ops.op("Mul", [y, gain], name=names.value(module, "scaled"))
        bias = self._bias(graph, node, module, x, ids, ops)
        if bias is not None:
            y = ops.op("Add", [y, bias], name=names.value(module, "add"))
        name_values(ops, y)
        return y

    def _delta(
        self, graph: ir.Graph, layer: AnyAdapter, x: ir.Value, ids: ir.Value, ops: tape.Tape
    ) -> ir.Value:
        rows = rank(x) == 2 and not self._is_scalar
        if isinstance(layer, OwnAdapter):
            stacks = stacked_blocks(layer)
            function = functions.TASK_OWN_DELTA_ROWS if rows else functions.TASK_OWN_DELTA
        else:
            stacks = stacked_cores(layer)
            function = functions.TASK_DELTA_ROWS if rows else functions.TASK_DELTA
        factors = [self.stack(graph, layer.module, name, v) for name, v in stacks.items()]
        return self.custom(function, [x, ids, *factors], names.value(layer.module, "delta"), ops)

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
        adapters, name = self._bound.adapters, names.bias(module)
        own = [adapters.replacement(name, task.index) for task in adapters.tasks]
        if name in adapters.replaced or all(bias is None for bias in own):
            return node.inputs[2] if len(node.inputs) > 2 else None
        rows = np.stack([task_bias(self._bound, module, task.index) for task in adapters.tasks])
        return self.vectors(graph, module, "biases", rows, x, ids, ops)

    def _weight_t(self, graph: ir.Graph, module: str) -> ir.Value:
        if f"{module}.weight" in self._bound.adapters.task_replaced:
            raise GraphError(
                f"{module}: one task adapts this layer, another replaced it whole",
                expected=(
                    "one or the other for all tasks, because the base weight is shared by all "
                    "rows of a batch"
                ),
                fix="Export this model per task: --layout per-task",
            )
        base = self._bound.base_tensor(f"{module}.weight")
        if is_conv1d(self._bound.base.config, module):
            return add_initializer(graph, names.weight_t(module), base.shape, base.numpy)
        shape = base.shape[::-1]
        return add_initializer(graph, names.weight_t(module), shape, lambda: base.numpy().T)

    def _head(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        weights, biases = stacked_heads(self._heads(module))
        stacks = [
            self.stack(graph, module, "weights", weights),
            self.stack(graph, module, "biases", biases),
        ]
        x = input_of(node)
        function = functions.TASK_HEAD_ROWS if rank(x) == 2 else functions.TASK_HEAD_TOKENS
        function = functions.ONE_TASK_HEAD if self._is_scalar else function
        return self.custom(function, [x, ids, *stacks], names.value(module, "head"), ops)

    def _output(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        module, x = module_of(node), input_of(node)
        rows = absences(self._bound.adapters, module)
        absent = self.vectors(graph, module, "absent", rows, x, ids, ops)
        y = ops.op("Add", [x, absent], name=names.value(module, names.ANSWERS))
        name_values(ops, y)
        return y

    def _heads(self, module: str) -> tuple[Head, ...]:
        """Return every task's own layer."""
        known = self._bound.adapters.heads.get(module)
        if known is not None:
            return known
        tasks = self._bound.adapters.tasks
        return tuple(task_linear(self._bound, module, task.index) for task in tasks)


def _has_delta(layer: AnyAdapter) -> bool:
    return not isinstance(layer, OwnAdapter) or any(b is not None for b in layer.blocks)
