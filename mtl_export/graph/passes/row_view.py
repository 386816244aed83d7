"""The input of a layer with one row for each row of the batch, whatever shape it comes in.

    batch       [B, ..., I]       Reshape to [B, -1, I]; [B, I] and [B, S, I] stay as they are
    repeated    [B k, ..., I]     Reshape to [B, -1, I]
    tiled       [k B, ..., I]     Reshape to [k, B, ..., I], Transpose, Reshape to [B, -1, I]
    second      [k, B, ..., I]    Transpose, Reshape to [B, -1, I]

The layer is lowered on this view, so it gathers one core for each row of the batch, not one
for each window or token; ``RowView.back`` undoes the view. A Reshape costs nothing at run
time. Ids of tokens are the same without I. The orders: ``mtl_export.graph.row_order``.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.errors import GraphError
from mtl_export.graph import names
from mtl_export.graph.passes.markers import (
    input_of,
    is_batch_first,
    layer_of,
    module_of,
    rank,
    use_of,
)


class RowView:
    """One marker's input, brought to ``[B, I]`` or ``[B, S, I]``, and the way back.

    Args:
        node: The marker.
        ids: One task id for each row of the batch, ``[B]``.
        ops: Records the nodes that change the shape; none where it is right already.

    Attributes:
        x: The input in the right form.

    Raises:
        GraphError: It is not known which rows of the batch the input's rows belong to.
    """

    def __init__(self, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> None:
        self._ids, self._ops, self._layer = ids, ops, layer_of(node)
        self._has_features = node.op_type != names.MARKER_EMBEDDING
        self._undo: list[Callable[[ir.Value], ir.Value]] = []
        x, order = input_of(node), _order(node)
        plain = range(2, 4) if self._has_features else range(2, 3)
        if order == "batch" and rank(x) in plain:
            self.x = x
            return
        batch = self._op("Shape", [ids], "batch")
        rows = rank(x)
        if order == "tiled":
            rest = self._op("Shape", [x], "rest", start=1)
            x = self._reshaped(x, [self._numbers(-1), batch, rest], "split")
            rows += 1
        if order in {"tiled", "second"}:
            x = self._swapped(x, rows)
        last = [_size(input_of(node))] if self._has_features else []
        self.x = self._reshaped(x, [batch, self._numbers(-1, *last)], "by_row")
        # A name of its own: sizes that other passes find alike must be alike.
        self.x.shape = ir.Shape([names.BATCH, names.value(self._layer, "by_row"), *last])
        self.x.type = input_of(node).type

    def back(self, y: ir.Value) -> ir.Value:
        """Return a result ``[B, ..., O]`` of ``x`` in the form that the input came in."""
        for undo in reversed(self._undo):
            y = undo(y)
        return y

    def _reshaped(self, x: ir.Value, parts: list[ir.Value], step: str) -> ir.Value:
        end = {"end": -1} if self._has_features else {}

        def undo(y: ir.Value) -> ir.Value:
            kept = self._op("Shape", [x], f"{step}_before", **end)
            shape = self._op("Concat", [kept, self._numbers(-1)], f"{step}_undone_shape", axis=0)
            return self._op("Reshape", [y, shape], f"{step}_undone")

        self._undo.append(undo)
        shape = self._op("Concat", parts, f"{step}_shape", axis=0)
        return self._op("Reshape", [x, shape], step)

    def _swapped(self, x: ir.Value, count: int) -> ir.Value:
        """Return ``x`` of ``count`` dimensions with its first two swapped."""

        def undo(y: ir.Value) -> ir.Value:
            axes = count if self._has_features else count + 1
            return self._op("Transpose", [y], "swapped_back", perm=[1, 0, *range(2, axes)])

        self._undo.append(undo)
        return self._op("Transpose", [x], "swapped", perm=[1, 0, *range(2, count)])

    def _numbers(self, *numbers: int) -> ir.Value:
        step = f"sizes_{len(self._ops.nodes)}"
        return self._op("Constant", [], step, value_ints=list(numbers))

    def _op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        step: str,
        **attributes: int | list[int],
    ) -> ir.Value:
        return self._ops.op(op_type, inputs, attributes, name=names.value(self._layer, step))


def _order(node: ir.Node) -> str:
    x = input_of(node)
    noted = node.attributes.get(names.ROWS_ATTRIBUTE)
    if noted is not None:
        return noted.as_string()
    if rank(x) > 1 and is_batch_first(x):
        return "batch"
    use, count = use_of(node)
    which = f"use {use} of {count}: its input" if count > 1 else "its input"
    expected, why = (
        f"rows in an order that follows the batch: [{names.BATCH}, ...], a multiple of"
        f" it, or [..., {names.BATCH}, ...] with the batch second",
        "every row must be told its task, and trying inputs did not tell whose row is whose",
    )
    if rank(x) > 1 and x.shape is not None and x.shape[0] == 1:
        expected = "an input of its own for every row of the batch"
        why = "what follows takes one result for all rows, and each row's task makes another"
    raise GraphError(
        f"{module_of(node)}: {which} has shape {x.shape}",
        expected=f"{expected}, because {why}",
        fix="Export this model per task (--layout per-task), or with one task for the whole"
        " batch (--task-input scalar), or merge its tasks (mtl-export merge)",
    )


def _size(x: ir.Value) -> int:
    """Return the size of the last dimension."""
    last = x.shape[-1] if x.shape is not None else None
    if not isinstance(last, int):
        raise ValueError(f"{x.name} has shape {x.shape}: its features must be known")
    return last
