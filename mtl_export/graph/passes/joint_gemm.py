"""Compute base and low-rank part of a layer in one GEMM.

    x . W + z' . up + b    ->    [x, z', 1] . [W; up; b]        z' = z . core[task_ids]

Copying x costs 2 I numbers a token; what it saves is writing the delta and adding it, 4 O
numbers. So only layers with I < 2 O are rewritten: in a transformer all but the projection
back from the wide middle. Past U = 64 columns of up, the longer GEMM costs more than the Add.
The weights are put together by a Concat that runtimes fold when they load the file: in the
file W, up and b stay what they were.

Not for graphs that are to be quantised: scales of W would cover up as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import functions, names
from mtl_export.graph.passes.calls import (
    calls,
    declare,
    drop_uncalled,
    inputs_of,
    insert_before,
    only_user,
    replace,
)
from mtl_export.graph.passes.shared_down import module_of_call
from mtl_export.names import TASK_IDS

# ONNX Runtime, x86-64, 384 -> 384 and 384 -> 1536: U products cost what 4 numbers to memory do.
WIDEST_UP = 64
# What moves numbers without computing: no runtime fuses the bias into these.
LAYOUT_OPS = frozenset({"Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class _Layer:
    """One match: ``Add(MatMul(x, W), TaskUp(z, cores, up))``, and perhaps the bias after it."""

    call: ir.Node
    product: ir.Node
    last: ir.Node
    bias: ir.Value | None


class JointGemmPass(ir.passes.InPlacePass):
    """Replace two GEMMs and an Add by one GEMM where shapes say that it is cheaper.

    Cases
        1. ``Add(MatMul(x, W), TaskUp(z, cores, up))``  ->
           ``MatMul(TaskJoin(x, z, cores), Concat(W, up))``
        2. followed by ``Add(., b)``, b [O], that only Reshape, Transpose or the like read: the
           bias goes into the GEMM too, as a last row that meets a 1. Before anything else
           (GELU, a residual) it stays last, for runtimes fuse it there.
        3. I >= 2 O, U > 64, or shapes unknown: left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite what matches."""
        ones: dict[tuple[str, ...], ir.Value] = {}
        stacked: dict[tuple[ir.Value | None, ...], ir.Value] = {}
        found = [layer for node in calls(model, functions.TASK_UP) if (layer := _match(node))]
        for layer in found:
            _rewrite(layer, ones, stacked)
            declare(model, functions.TASK_JOIN if layer.bias is None else functions.TASK_JOIN_BIAS)
        if found:
            drop_uncalled(model)
        return ir.passes.PassResult(model, modified=bool(found))


def _match(call: ir.Node) -> _Layer | None:
    add = only_user(call.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    others = [value for value in inputs_of(add) if value is not call.outputs[0]]
    product = others[0].producer() if len(others) == 1 else None
    if product is None or product.op_type != "MatMul" or only_user(others[0]) is not add:
        return None
    weight = inputs_of(product)[1]
    if weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    inputs, outputs = weight.const_value.shape.numpy()
    if inputs >= 2 * outputs or not _is_narrow(inputs_of(call)[2]):
        return None
    after = only_user(add.outputs[0])
    bias = _foldable_bias(after, add.outputs[0], outputs)
    return _Layer(call, product, after if bias is not None and after is not None else add, bias)


def _is_narrow(up: ir.Value) -> bool:
    columns = up.shape[0] if up.shape is not None else None
    return isinstance(columns, int) and columns <= WIDEST_UP


def _foldable_bias(after: ir.Node | None, y: ir.Value, outputs: int) -> ir.Value | None:
    """Return the bias that ``after`` adds, if only layout ops read the sum."""
    if after is None or after.op_type != "Add" or after.outputs[0].is_graph_output():
        return None
    others = [value for value in inputs_of(after) if value is not y]
    if len(others) != 1 or others[0].const_value is None:
        return None
    users = after.outputs[0].consumers()
    if not users or any(user.op_type not in LAYOUT_OPS for user in users):
        return None
    return others[0] if others[0].const_value.shape.numpy() == (outputs,) else None


def _rewrite(
    layer: _Layer,
    ones: dict[tuple[str, ...], ir.Value],
    stacked: dict[tuple[ir.Value | None, ...], ir.Value],
) -> None:
    z, cores, up = inputs_of(layer.call)
    x, weight = inputs_of(layer.product)
    module = module_of_call(layer.call)
    ops = tape.Tape(layer.call.graph)
    inputs, function = [x, z, cores], functions.TASK_JOIN
    if layer.bias is not None:
        function = functions.TASK_JOIN_BIAS
        inputs.append(_ones(x, layer.product, ones))
    key = (weight, up, layer.bias)
    if key not in stacked:  # a module that is used several times has one weight
        stacked[key] = _stacked(weight, up, layer.bias, module, ops)
    joined = ops.op(function, inputs, domain=names.DOMAIN, name=names.value(module, "join"))
    y = ops.op("MatMul", [joined, stacked[key]], name=names.value(module, "joint"))
    graph = layer.call.graph
    replace(layer.last, ops, y)
    for node in (layer.last, _add_of(layer), layer.product, layer.call):
        if graph is not None and node.graph is graph:
            graph.remove(node, safe=True)


def _stacked(
    weight: ir.Value, up: ir.Value, bias: ir.Value | None, module: str, ops: tape.Tape
) -> ir.Value:
    """Return weight, up and bias below each other."""
    rows = [weight, up]
    if bias is not None:
        axis = ops.op("Constant", [], {"value_ints": [0]}, name=names.value(module, "bias_axis"))
        rows.append(ops.op("Unsqueeze", [bias, axis], name=names.value(module, "bias_row")))
    return ops.op("Concat", rows, {"axis": 0}, name=names.value(module, "joint_weight"))


def _add_of(layer: _Layer) -> ir.Node:
    add = only_user(layer.call.outputs[0])
    return layer.last if add is None else add


def _ones(x: ir.Value, before: ir.Node, known: dict[tuple[str, ...], ir.Value]) -> ir.Value:
    """Return 1 for every token of x, ``[B, S, 1]``; made once for each shape."""
    dims = tuple(str(dim) for dim in x.shape.dims[:-1]) if x.shape is not None else (x.name or "",)
    if dims not in known:
        name = f"{TASK_IDS}/ones{len(known) or ''}"
        ops = tape.Tape(before.graph)
        rows = ops.op("Shape", [x], {"start": 0, "end": -1}, name=f"{name}/rows")
        width = ops.op("Constant", [], {"value_ints": [1]}, name=f"{name}/width")
        shape = ops.op("Concat", [rows, width], {"axis": 0}, name=f"{name}/shape")
        one = ops.op("Constant", [], {"value_float": 1.0}, name=f"{name}/one")
        known[dims] = ops.op("Expand", [one, shape], name=name)
        insert_before(before, ops)
    return known[dims]
