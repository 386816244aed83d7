"""A graph with Q/DQ and the float graph it came from -> the same graph without them.

    DQ(Q(x))    ->  x            where Q and DQ agree and are symmetric
    DQ(W_q, s)  ->  W            W the float graph's, where W_q is W rounded to the nearest;
                                 in int4: up or down, or cut to the largest that is stored

What is left computes in float, so that it can be held to the rule for float graphs: whatever
quantising did beside rounding shows. A layer whose change of the task is added apart
(``<layer>/rest``) has W without that change.

I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.opened import open_graph
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from mtl_export.graph.passes.weights import add_initializer

STORED = ".weight_q"
# E4M3 keeps three bits behind the point: half of the last one, and half the smallest number.
E4M3_RELATIVE, E4M3_SMALLEST = 2.0**-4, 2.0**-10
# A block's scale keeps at least this share of its largest magnitude; what is beyond is cut.
INT4_RANGE, INT4_CUT = (-8.0, 7.0), 0.7
# Scales are float32, so a value in the middle of two steps may be a little beyond it.
ROUNDING = 1e-3


def write_dequantised(path: Path, float_path: Path, target: Path) -> list[str]:
    """Write the graph at ``path`` without Q/DQ to ``target`` and return what is wrong with it.

    Args:
        path: The quantised graph.
        float_path: The graph it was made from.
        target: The file to write; its data go beside it.
    """
    model, exact = open_graph(path), open_graph(float_path)
    SplitGemmPass()(exact)
    weights = {
        str(node.name): node.inputs[1].const_value
        for node in exact.graph
        if len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].is_initializer()
    }
    problems = []
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            stored = node.inputs[0]
            is_weight = stored is not None and stored.is_initializer()
            problem = _weight(model, node, weights) if is_weight else _activation(node)
            problems += [problem] if problem else []
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, target, external_data=f"{target.name}.data")
    return problems


def _activation(node: ir.Node) -> str:
    """Read what is quantised in place of what is dequantised."""
    stored = node.inputs[0]
    quantise = stored.producer() if stored is not None else None
    if quantise is None or quantise.op_type != "QuantizeLinear":
        return f"{node.name} dequantises what nothing quantised"
    before, after = ([_values(value) for value in one.inputs[1:]] for one in (quantise, node))
    if len(before) != len(after) or not all(map(_same, before, after)):
        return f"{node.name} has not the scale of {quantise.name}"
    if len(before) > 1 and (before[1] is None or before[1].astype(np.float32).any()):
        return f"{quantise.name} has a zero point that is not 0"
    source = quantise.inputs[0]
    assert source is not None
    for user, place in list(node.outputs[0].uses()):
        user.replace_input_with(place, source)
    return ""


def _weight(model: ir.Model, node: ir.Node, weights: Mapping[str, ir.TensorProtocol | None]) -> str:
    """Put the float weight in the place of the stored one."""
    stored, scale = node.inputs[0], _values(node.inputs[1])
    users = list(node.outputs[0].uses())
    exact = weights.get(str(users[0][0].name)) if len(users) == 1 else None
    values = _values(stored)
    if stored is None or scale is None or values is None or exact is None:
        return f"{node.name} dequantises a weight that the float graph does not have"
    layer = str(stored.name).removesuffix(STORED)
    wanted = exact.numpy().astype(np.float64)
    wanted = wanted - _rest(model, layer, wanted.shape)
    if wanted.shape != values.shape:
        return f"{layer} has shape {list(values.shape)}, not {list(wanted.shape)}"
    spread = _spread(node, scale.astype(np.float64), values.shape)
    beyond = int((~_is_rounded(values, spread, wanted)).sum())
    dtype = exact.dtype
    value = add_initializer(
        model.graph, f"{layer}.weight_float", wanted.shape, lambda: wanted, dtype
    )
    users[0][0].replace_input_with(users[0][1], value)
    return f"{beyond} weights of {layer} are not the float graph's, rounded" if beyond else ""


def _is_rounded(values: Array, spread: Array, wanted: Array) -> Array:
    """Return where ``values`` times ``spread`` are ``wanted``, rounded as their type may be."""
    stored = values.astype(np.float64)
    if values.dtype.name == "int4":
        ratio = wanted / spread
        beside = np.abs(stored - np.clip(ratio, *INT4_RANGE)) <= 1 + ROUNDING
        whole: Array = beside & (np.abs(ratio) <= INT4_RANGE[1] / INT4_CUT * (1 + ROUNDING))
        return whole
    allowed = spread / 2
    if values.dtype.name.startswith("float8"):
        allowed = np.maximum(E4M3_RELATIVE * np.abs(wanted), E4M3_SMALLEST * spread)
    result: Array = np.abs(stored * spread - wanted) <= allowed * (1 + ROUNDING)
    return result


def _rest(model: ir.Model, layer: str, shape: tuple[int, ...]) -> Array:
    """Return what is added apart from the product of ``layer``."""
    if not any(node.name == f"{layer}/rest" for node in model.graph):
        return np.zeros(shape)
    down, up = (_values(model.graph.initializers[f"{layer}.{part}"]) for part in ("down", "up"))
    assert down is not None
    assert up is not None
    product: Array = down.astype(np.float64) @ up.astype(np.float64)
    return product


def _spread(node: ir.Node, scale: Array, shape: tuple[int, ...]) -> Array:
    """Return the scale of every stored value."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if scale.ndim == len(shape):
        size = node.attributes["block_size"].as_int()
        repeated: Array = np.repeat(scale, size, axis=axis)
        return repeated
    around = [1] * len(shape)
    around[axis] = -1
    wide: Array = np.broadcast_to(scale.reshape(around), shape)
    return wide


def _values(value: ir.Value | None) -> Array | None:
    constant = None if value is None else value.const_value
    return None if constant is None else constant.numpy()


def _same(left: Array | None, right: Array | None) -> bool:
    return left is not None and right is not None and left.tobytes() == right.tobytes()
