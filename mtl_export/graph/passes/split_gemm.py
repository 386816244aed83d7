"""Undo ``joint_gemm``: for whoever must see the base weight by itself, as quantisers do.

[x, z', 1] . [W; up; b]    ->    x . W + z' . up + b        z' = z . cores
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import functions, names
from mtl_export.graph.passes.calls import calls, declare, drop_uncalled, inputs_of, replace
from mtl_export.graph.passes.shared_down import module_of_call


class SplitGemmPass(ir.passes.InPlacePass):
    """Take joint GEMMs apart; the weights are in the file as they were.

    Cases
        1. ``MatMul(TaskJoin(x, z, cores), Concat(W, up))``  ->
           ``Add(MatMul(x, W), TaskUp(z, cores, up))``
        2. ``MatMul(TaskJoinBias(x, z, cores, ones), Concat(W, up, b))``  ->  the same and
           ``Add(., b)`` after it
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every call of ``TaskJoin`` and ``TaskJoinBias``."""
        joins = [*calls(model, functions.TASK_JOIN), *calls(model, functions.TASK_JOIN_BIAS)]
        for join in joins:
            for user in join.outputs[0].consumers():
                _split(join, user)
            model.graph.remove(join, safe=True)
        if joins:
            declare(model, functions.TASK_UP)
            drop_uncalled(model)
        return ir.passes.PassResult(model, modified=bool(joins))


def _split(join: ir.Node, product: ir.Node) -> None:
    x, z, cores = inputs_of(join)[:3]
    stacked = product.inputs[1]
    concat = stacked.producer() if stacked is not None else None
    if product.op_type != "MatMul" or concat is None or concat.op_type != "Concat":
        raise ValueError(f"{join.name} is not followed by its GEMM")
    weight, up, *rest = inputs_of(concat)
    module = module_of_call(join)
    ops = tape.Tape(product.graph)
    y = ops.op("MatMul", [x, weight], name=names.value(module, "matmul"))
    delta = ops.op(
        functions.TASK_UP, [z, cores, up], domain=names.DOMAIN, name=names.value(module, "delta")
    )
    y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
    for row in rest:
        unsqueeze = row.producer()
        if unsqueeze is None:
            raise ValueError(f"{concat.name} has a row that is no bias")
        y = ops.op("Add", [y, inputs_of(unsqueeze)[0]], name=names.value(module, "add"))
    replace(product, ops, y)
