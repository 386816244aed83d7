"""Lower every marker to one task's own stock layer."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, module_of, replace_marker
from mtl_export.graph.passes.weights import add_initializer
from mtl_export.merge.merge import merged_weight


class MergeTaskPass(ir.passes.InPlacePass):
    """Replace the markers by MatMul and Add with one task's merged weights.

    Cases
        1. ``TaskLinear(x, W, b)``  ->  ``Add(MatMul(x, W_t^T), b)``
        2. ``TaskLinear(x, W)``     ->  ``MatMul(x, W_t^T)``
        3. ``TaskHead(x)``          ->  ``Add(MatMul(x, H_t^T), h_t)``, as wide as the task's
           own labels; the graph output's last dimension follows.

    The traced weights stay in the graph's initializers, unused, for a later
    ``RemoveUnusedNodesPass``.
    """

    def __init__(self, bound: BoundModel, task: Task) -> None:
        super().__init__()
        self._bound = bound
        self._task = task

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower all markers of ``model``."""
        found = markers(model)
        for node in found:
            lower = self._head if node.op_type == names.MARKER_HEAD else self._linear
            ops = tape.Tape(node.graph)
            result = lower(model.graph, node, ops)
            replace_marker(node, ops, result)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no marker is left."""
        ensure_no_markers(model)

    def _linear(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        layer = self._bound.adapters.layers[module]
        base = self._bound.base_tensor(f"{module}.weight")
        index = self._task.index

        def weight() -> Array:
            stored = merged_weight(base.numpy(), layer, index, "F32")
            return stored if layer.transposed else stored.T

        shape = (layer.in_features, layer.out_features)
        initializer = add_initializer(graph, names.weight_t(module), shape, weight)
        y = ops.op("MatMul", [node.inputs[0], initializer], name=names.value(module, "matmul"))
        bias = self._bias(graph, node, module)
        if bias is not None:
            y.name = names.value(module, "product")
            y = ops.op("Add", [y, bias], name=names.value(module, "add"))
        return y

    def _bias(self, graph: ir.Graph, node: ir.Node, module: str) -> ir.Value | None:
        """Return the traced bias, or the task's own."""
        adapters, name = self._bound.adapters, names.bias(module)
        own = adapters.replacement(name, self._task.index)
        if own is None or name in adapters.replaced:
            return node.inputs[2] if len(node.inputs) > 2 else None
        return add_initializer(graph, names.part(module, "task_bias"), own.shape, lambda: own)

    def _head(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        head = self._bound.adapters.heads[module][self._task.index]
        labels, features = head.weight.shape
        weight = add_initializer(
            graph, names.weight_t(module), (features, labels), lambda: head.weight.T
        )
        bias = add_initializer(graph, names.bias(module), (labels,), lambda: head.bias)
        product = ops.op("MatMul", [node.inputs[0], weight], name=names.value(module, "matmul"))
        product.name = names.value(module, "product")
        y = ops.op("Add", [product, bias], name=names.value(module, "add"))
        old = node.outputs[0]
        if old.shape is not None:
            old.shape = ir.Shape([*old.shape.dims[:-1], labels])
        return y
