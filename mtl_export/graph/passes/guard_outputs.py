"""Keep outputs that no task changes from answering to an id that no task has."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph.passes.routing import name_values

SIZES = frozenset({"Shape", "Size"})


class GuardOutputsPass(ir.passes.InPlacePass):
    """Poison the rows of outputs without adapted layers before them, as their neighbours are.

    Where a model runs as several graphs, tasks may leave one of them alone. It takes
    ``task_ids`` all the same, so that callers feed every part alike. Where a model has several
    outputs, tasks may change what leads to one of them only.

    Cases
        1. an output that a layer which gathers by ``task_ids`` leads to: nothing to do, its
           stacks are poisoned.
        2. another floating output y [B, ...]  ->  ``Add(y, Where(known, 0, NaN))``; known
           rows keep their bits.
        3. keys and values for the next step: left alone, for the logits beside them tell.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Guard the outputs of ``model``, whose ids other passes have guarded."""
        graph = model.graph
        nodes = {node.name: node for node in graph}
        ids = nodes.get("task_ids/one") or nodes["task_ids/guarded"]
        poisoned = _led_to(ids.outputs[0])
        open_outputs = {
            index: value
            for index, value in enumerate(graph.outputs)
            if value not in poisoned
            and value.dtype == ir.DataType.FLOAT
            and not str(value.name).startswith("present.")
        }
        if not open_outputs:
            return ir.passes.PassResult(model, modified=False)
        ops = tape.Tape(graph)
        zero = ops.op("Constant", [], {"value_float": 0.0}, name="task_ids/nothing")
        nan = ops.op("Constant", [], {"value_float": math.nan}, name="task_ids/nan")
        known = nodes["task_ids/known"].outputs[0]
        poison = ops.op("Where", [known, zero, nan], name="task_ids/poison")
        name_values(ops)
        for index, value in open_outputs.items():
            graph.outputs[index] = _guarded(value, str(value.name), poison, ops)
        return ir.passes.PassResult(model, modified=True)


def _led_to(ids: ir.Value) -> set[ir.Value]:
    """Return all values that are computed from ``ids``, not from how many there are alone."""
    found: set[ir.Value] = set()
    pending = [ids]
    while pending:
        for node in pending.pop().consumers():
            if node.op_type not in SIZES:
                new = [value for value in node.outputs if value not in found]
                found.update(new)
                pending += new
    return found


def _guarded(value: ir.Value, name: str, poison: ir.Value, ops: tape.Tape) -> ir.Value:
    others = list(range(1, len(value.shape or ())))
    axes = ops.op("Constant", [], {"value_ints": others}, name=f"{name}/row_axes")
    rows = ops.op("Unsqueeze", [poison, axes], name=f"{name}/poison")
    value.name = f"{name}/unguarded"
    guarded = ops.op("Add", [value, rows], name=f"{name}/guard")
    axes.name, rows.name, guarded.name = f"{name}/row_axes_value", f"{name}/poison_value", name
    guarded.shape, guarded.type = value.shape, value.type
    return guarded
