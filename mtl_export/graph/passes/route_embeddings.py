"""Lower the markers of embeddings to look-ups that serve all tasks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.normal_form import AnyAdapter
from mtl_export.errors import GraphError
from mtl_export.graph import functions, names
from mtl_export.graph.passes.markers import input_of, module_of, rank
from mtl_export.graph.passes.own_tensors import task_tensor
from mtl_export.graph.passes.routing import RoutePass, name_values
from mtl_export.graph.passes.stacks import embedding_blocks, embedding_table, with_poison
from mtl_export.graph.passes.weights import add_initializer


class RouteEmbeddingsPass(RoutePass):
    """Replace TaskEmbedding by look-ups of each row's task.

    Cases
        1. an adapted embedding, ids x [B, S]  ->
           ``Add(Gather(W, x), TaskEmbeddingDelta(x, ids, starts, downs, ups))``
        2. with gains: ``Mul`` by the gathered gain.
        3. an embedding of which tasks trained some rows  ->
           ``TaskEmbeddingRows(x, ids, starts, table, slots)``; the table is the base's with the
           trained rows below it, and the slots say where in it each task's tokens are.
        4. an embedding that tasks trained whole: the same, its table is theirs stacked.
        5. x [1, S], as positions are: the vectors become each row's own, [B, S, O].
        6. x in other rows than the batch's: one of the above on a view of it (``row_view``).
        7. one task for the whole batch, x [..., S]: the same with ids [1].
        8. an embedding that one task adapts and another replaces: refused.
    """

    op_types: ClassVar[frozenset[str]] = frozenset({names.MARKER_EMBEDDING})

    def lower(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record one embedding."""
        module, x = module_of(node), input_of(node)
        if self._is_scalar:
            axis = ops.op("Constant", [], {"value_ints": [0]}, name=names.value(module, "axis"))
            ids = ops.op("Unsqueeze", [ids, axis], name=names.value(module, "ids"))
        layer = self._bound.adapters.layers.get(module)
        is_replaced = f"{module}.weight" in self._bound.adapters.own_tensors
        if layer is None:
            y = self._replaced(graph, module, x, ids, ops)
        elif is_replaced:
            raise GraphError(
                f"{module}: one task adapts this embedding, another replaced it",
                expected=(
                    "one or the other for all tasks, because the base's embedding is shared by "
                    "all rows of a batch"
                ),
                fix="Export this model per task: --layout per-task",
            )
        else:
            y = self._adapted(graph, layer, x, ids, ops)
        name_values(ops, y)
        if not self._is_scalar:
            _widen(node.outputs[0])
        return y

    def _lowered(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        x = input_of(node)
        if x.shape is not None and rank(x) == 2 and x.shape[0] == 1:
            return self.lower(graph, node, ids, ops)
        return super()._lowered(graph, node, ids, ops)

    def _adapted(
        self, graph: ir.Graph, layer: AnyAdapter, x: ir.Value, ids: ir.Value, ops: tape.Tape
    ) -> ir.Value:
        module = layer.module
        base = self._bound.base_tensor(f"{module}.weight")
        name = names.part(module, "weight")
        table = graph.initializers.get(name) or add_initializer(graph, name, base.shape, base.numpy)
        y = ops.op("Gather", [table, x], {"axis": 0}, name=names.value(module, "gather"))
        parts = {
            name: self.stack(graph, module, name, values)
            for name, values in embedding_blocks(layer).items()
        }
        starts = self._starts(graph, module, layer.in_features)
        inputs = [x, ids, starts, parts["downs"], parts["ups"]]
        name = names.value(module, "delta")
        delta = self.custom(functions.TASK_EMBEDDING_DELTA, inputs, name, ops)
        y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
        if layer.gain is not None:
            stack = self.stack(graph, module, "gain", with_poison(layer.gain))
            name = names.value(module, "gain")
            gain = self.custom(functions.TASK_VECTORS, [ids, stack], name, ops)
            y = ops.op("Mul", [y, gain], name=names.value(module, "scaled"))
        return y

    def _replaced(
        self, graph: ir.Graph, module: str, x: ir.Value, ids: ir.Value, ops: tape.Tape
    ) -> ir.Value:
        adapters, name = self._bound.adapters, f"{module}.weight"
        base = self._bound.base_tensor(name)
        whole = [
            task_tensor(self._bound, name, task.index)
            if adapters.replacement(name, task.index) is not None
            else None
            for task in adapters.tasks
        ]
        rows = [adapters.own_rows(name, task.index) for task in adapters.tasks]
        table, slots = embedding_table(base.widened(), whole, rows)
        values = [
            self.stack(graph, module, "table", table),
            add_initializer(
                graph, names.part(module, "slots"), slots.shape, lambda: slots, ir.DataType.INT64
            ),
        ]
        starts = self._starts(graph, module, base.shape[0])
        inputs = [x, ids, starts, *values]
        return self.custom(functions.TASK_EMBEDDING_ROWS, inputs, names.value(module, "rows"), ops)

    def _starts(self, graph: ir.Graph, module: str, entries: int) -> ir.Value:
        """Return where each task's part of a stack of ``entries`` a task begins."""
        starts = np.arange(len(self._bound.adapters.tasks) + 1, dtype=np.int64) * entries
        name = names.part(module, "starts")
        return add_initializer(graph, name, starts.shape, lambda: starts, ir.DataType.INT64)


def _widen(value: ir.Value) -> None:
    """Give ``value``, and what is computed from it alone, one row for each row of the batch."""
    pending = [value]
    while pending:
        current = pending.pop()
        if current.shape is None or len(current.shape) == 0 or current.shape[0] != 1:
            continue
        current.shape = ir.Shape([names.BATCH, *current.shape.dims[1:]])
        for consumer in current.consumers():
            pending += consumer.outputs
