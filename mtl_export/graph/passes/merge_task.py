"""Lower every marker to one task's own stock layer."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.graph.passes.markers import ensure_no_markers, markers, module_of, replace_marker
from mtl_export.graph.passes.own_tensors import task_linear, task_tensor
from mtl_export.graph.passes.weights import add_initializer
from mtl_export.merge.fold import merged_weight


class MergeTaskPass(ir.passes.InPlacePass):
    """Replace the markers by MatMul and Add with one task's merged weights.

    Cases
        1. ``TaskLinear(x, W, b)``  ->  ``Add(MatMul(x, W_t^T), b)``
        2. ``TaskLinear(x, W)``     ->  ``MatMul(x, W_t^T)``
        3. ``TaskHead(x)``          ->  ``Add(MatMul(x, H_t^T), h_t)``, as wide as the task's
           own labels; the graph output's last dimension follows.
        4. ``TaskHead`` of a layer inside the model that tasks trained whole: the same.
        5. ``TaskEmbedding(ids)``    ->  ``Gather(W_t, ids)``
        6. ``TaskNorm(x, w, b)``     ->  ``LayerNormalization(x, w_t, b_t)``
        7. ``TaskOutput(x)``         ->  x; a task's other outputs are left to ``OwnOutputPass``

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
            lower = {
                names.MARKER_LINEAR: self._linear,
                names.MARKER_HEAD: self._head,
                names.MARKER_EMBEDDING: self._embedding,
                names.MARKER_NORM: self._norm,
                names.MARKER_OUTPUT: self._output,
            }[node.op_type]
            ops = tape.Tape(node.graph)
            result = lower(model.graph, node, ops)
            replace_marker(node, ops, result)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no marker is left."""
        ensure_no_markers(model)

    def _linear(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        shape = self._bound.base_tensor(f"{module}.weight").shape
        is_transposed = is_conv1d(self._bound.base.config, module)

        def weight() -> Array:
            stored = self._weight(module)
            return stored if is_transposed else stored.T

        shape = shape if is_transposed else shape[::-1]
        initializer = add_initializer(
            graph, names.weight_t(module), shape, weight, common=self._is_the_bases(module)
        )
        y = ops.op("MatMul", [node.inputs[0], initializer], name=names.value(module, "matmul"))
        bias = self._bias(graph, node, module)
        if bias is not None:
            y.name = names.value(module, "product")
            y = ops.op("Add", [y, bias], name=names.value(module, "add"))
        return y

    def _weight(self, module: str) -> Array:
        """Return the task's weight as it is stored: merged, replaced, or the base's."""
        layer, index = self._bound.adapters.layers.get(module), self._task.index
        name = f"{module}.weight"
        if layer is None or self._bound.adapters.replacement(name, index) is not None:
            return task_tensor(self._bound, name, index)
        return merged_weight(self._bound.base_tensor(name).numpy(), layer, index, "F32")

    def _is_the_bases(self, module: str) -> bool:
        """Return whether no task has a weight of its own here, so that all have the base's."""
        adapters = self._bound.adapters
        return module not in adapters.layers and f"{module}.weight" not in adapters.own_tensors

    def _embedding(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        shape = self._bound.base_tensor(f"{module}.weight").shape
        table = add_initializer(
            graph, names.part(module, "task_weight"), shape, lambda: self._weight(module)
        )
        name = names.value(module, "gather")
        return ops.op("Gather", [table, node.inputs[0]], {"axis": 0}, name=name)

    def _norm(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        own = [self._own(graph, module, kind) for kind in ("weight", "bias")]
        epsilon = node.attributes["epsilon"].as_float()
        return ops.op(
            "LayerNormalization",
            [node.inputs[0], *own],
            {"axis": -1, "epsilon": epsilon},
            name=names.value(module, "normalised"),
        )

    def _output(self, _: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        name = names.value(module_of(node), "only")
        return ops.op("Identity", [node.inputs[0]], name=name)

    def _own(self, graph: ir.Graph, module: str, kind: str) -> ir.Value:
        """Return the task's own tensor, or the base's, as an initializer."""
        bound, index, name = self._bound, self._task.index, f"{module}.{kind}"
        return add_initializer(
            graph,
            names.part(module, f"task_{kind}"),
            bound.base_tensor(name).shape,
            lambda: task_tensor(bound, name, index),
            common=name not in bound.adapters.own_tensors,
        )

    def _bias(self, graph: ir.Graph, node: ir.Node, module: str) -> ir.Value | None:
        """Return the traced bias, or the task's own."""
        adapters, name = self._bound.adapters, names.bias(module)
        own = adapters.replacement(name, self._task.index)
        if own is None or name in adapters.replaced:
            return node.inputs[2] if len(node.inputs) > 2 else None
        return add_initializer(graph, names.part(module, "task_bias"), own.shape, lambda: own)

    def _head(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        heads = self._bound.adapters.heads.get(module)
        index = self._task.index
        head = task_linear(self._bound, module, index) if heads is None else heads[index]
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
