"""Gather the cores of all layers at once.

    core_i[ids], i = 1 ... L    ->    [core_1, ..., core_L][ids], split

The Concat of the cores is folded when the file is loaded. What is left is one Gather for the
whole model; with one per layer, small batches spend more on starting them than on copying.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import functions
from mtl_export.graph.passes.calls import calls, inputs_of, insert_before
from mtl_export.graph.passes.shared_down import width_of
from mtl_export.names import TASK_IDS


class SharedCoresPass(ir.passes.InPlacePass):
    """Replace the Gathers of cores by one and a Split.

    Cases
        1. ``Gather(core_i, ids)`` of several ``TaskUp`` with the same ids and D  ->
           ``Split(Gather(Concat(core_1, ..., core_L), ids))``
        2. one alone: left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the cores of all calls of ``TaskUp``."""
        groups: dict[tuple[ir.Value, int], list[ir.Node]] = {}
        for node in calls(model, functions.TASK_UP):
            gather = inputs_of(node)[1].producer()
            if gather is None or gather.op_type != "Gather":
                continue
            core, ids = inputs_of(gather)
            rank = core.shape[1] if core.shape is not None else None
            if isinstance(rank, int):
                groups.setdefault((ids, rank), []).append(gather)
        shared = {key: gathers for key, gathers in groups.items() if len(gathers) > 1}
        for number, ((ids, _), gathers) in enumerate(shared.items()):
            _share(ids, gathers, f"{TASK_IDS}/cores{number or ''}")
        return ir.passes.PassResult(model, modified=bool(shared))


def _share(ids: ir.Value, gathers: list[ir.Node], name: str) -> None:
    # A module that is used several times has one core.
    cores = list(dict.fromkeys(inputs_of(gather)[0] for gather in gathers))
    ops = tape.Tape(gathers[0].graph)
    beside = ops.op("Concat", cores, {"axis": 2}, name=f"{name}/all")
    picked = ops.op("Gather", [beside, ids], {"axis": 0}, name=f"{name}/own")
    widths = [width_of(core) for core in cores]
    sizes = ops.op("Constant", [], {"value_ints": widths}, name=f"{name}/widths")
    parts = ops.op_multi_out(
        "Split", [picked, sizes], {"axis": -1}, num_outputs=len(cores), name=f"{name}/split"
    )
    insert_before(gathers[0], ops)
    own = dict(zip(cores, parts, strict=True))
    for gather in gathers:
        gather.outputs[0].replace_all_uses_with(own[inputs_of(gather)[0]])
        if gather.graph is not None:
            gather.graph.remove(gather, safe=True)
