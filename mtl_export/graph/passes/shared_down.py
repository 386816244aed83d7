"""Let layers that read the same x share one down-projection.

    TaskDelta(x, ids, down_i, core_i, up_i), i = q, k, v
        z = x . [down_q, down_k, down_v], split    TaskUp(z_i, core_i[ids], up_i)

Runtimes fold the Concat of the downs when they load the file. One GEMM of 3 D columns reads x
once where three of D columns, too narrow for any kernel, read it three times.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import functions, names
from mtl_export.graph.passes.calls import (
    calls,
    declare,
    drop_uncalled,
    inputs_of,
    insert_before,
    replace,
)


class SharedDownPass(ir.passes.InPlacePass):
    """Take the down-projection and the gather of the core out of ``TaskDelta``.

    Cases
        1. ``TaskDelta(x, ids, down, core, up)``  ->
           ``TaskUp(MatMul(x, down), Gather(core, ids), up)``
        2. several of them with the same x and ids: one ``MatMul`` with all downs side by
           side, and a ``Split``.
        3. ``TaskDeltaRows``, own factors, embeddings: left as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite all calls of ``TaskDelta``."""
        groups: dict[tuple[ir.Value, ir.Value], list[ir.Node]] = {}
        for node in calls(model, functions.TASK_DELTA):
            x, ids = inputs_of(node)[:2]
            groups.setdefault((x, ids), []).append(node)
        for (x, ids), group in groups.items():
            for node, z in zip(group, _projected(x, group), strict=True):
                _, _, _, core, up = inputs_of(node)
                module = module_of_call(node)
                ops = tape.Tape(model.graph)
                picked = ops.op(
                    "Gather", [core, ids], {"axis": 0}, name=names.value(module, "own_core")
                )
                y = ops.op(functions.TASK_UP, [z, picked, up], domain=names.DOMAIN, name=node.name)
                replace(node, ops, y)
        if groups:
            declare(model, functions.TASK_UP)
            drop_uncalled(model)
        return ir.passes.PassResult(model, modified=bool(groups))


def module_of_call(node: ir.Node) -> str:
    """Return the module whose layer a call of ours serves."""
    return (node.name or "").rpartition("/")[0]


def _projected(x: ir.Value, group: list[ir.Node]) -> list[ir.Value]:
    """Return x . down for each call, recorded before the first of them."""
    downs = [inputs_of(node)[2] for node in group]
    module = module_of_call(group[0])
    ops = tape.Tape(group[0].graph)
    if len(group) == 1:
        parts = [ops.op("MatMul", [x, downs[0]], name=names.value(module, "down"))]
    else:
        beside = ops.op("Concat", downs, {"axis": 1}, name=names.value(module, "shared_down"))
        z = ops.op("MatMul", [x, beside], name=names.value(module, "down"))
        widths = [width_of(down) for down in downs]
        sizes = ops.op(
            "Constant", [], {"value_ints": widths}, name=names.value(module, "down_widths")
        )
        parts = list(
            ops.op_multi_out(
                "Split", [z, sizes], {"axis": -1}, num_outputs=len(group),
                name=names.value(module, "down_split"),
            )
        )  # fmt: skip
    insert_before(group[0], ops)
    for part, down in zip(parts, downs, strict=True):
        if x.shape is not None:
            part.shape = ir.Shape([*x.shape.dims[:-1], width_of(down)])
            part.type = x.type
    return parts


def width_of(value: ir.Value) -> int:
    """Return the size of the last dimension of an initializer."""
    if value.shape is None or not isinstance(value.shape[-1], int):
        raise ValueError(f"{value.name} has no known width")
    return value.shape[-1]
