"""A float graph and ranges -> the same graph with explicit, symmetric Q/DQ nodes.

    int8, fp8   MatMul(x, W)  ->  MatMul(DQ(Q(x, s_x)), DQ(W_q, s_w))     s_w [O]
    int4        MatMul(x, W)  ->  MatMul(x, DQ(W_q, s_w, block_size=64))  s_w [I / 64, O]

and likewise Conv. Weights are stored quantised. Zero points are 0, scales are constants
(TensorRT refuses others). Every product has a Q of its own, also where several read one
activation: ONNX Runtime on x86 turns signed activations into unsigned ones, which its
kernels want, only where Q has one reader; shared, 18 of MiniLM's 36 products stay float.
Zero points are each layer's own too, or ONNX Runtime would find the Qs equal and share one.
What was added has names below the layer's: <layer>.x_scale, <layer>.weight_q, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir import tape

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.passes.weights import add_initializer
from mtl_export_calibration.deltas import DeltaSource
from mtl_export_calibration.formats import INT4_BLOCK, NumberFormat
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.opset import ensure_opset
from mtl_export_calibration.weights import weight_grid

DTYPES = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
}


@dataclass(frozen=True)
class QuantisationPlan:
    """What to quantise and how.

    Attributes:
        number: The format.
        layers: The layers to quantise.
        amax: Range of every activation, by name; unused where only weights are quantised.
        apart: Names of the layers whose delta is added in high precision.
        rows: Some rows of every activation, by name, that int4 weights are rounded for.
    """

    number: NumberFormat
    layers: Sequence[QuantLayer]
    amax: Mapping[str, float]
    apart: frozenset[str] = frozenset()
    rows: Mapping[str, Array] = field(default_factory=dict)


def quantise(
    model: ir.Model, recipe: QuantisationPlan, deltas: DeltaSource | None = None
) -> ir.Model:
    """Change ``model`` in place and return it.

    Args:
        model: A lowered graph; its external data must stay readable until it is saved.
        recipe: What to quantise.
        deltas: Gives the rests of layers that ``recipe.apart`` names.

    Raises:
        GraphError: The opset cannot be raised, or a layer is not in the graph.
    """
    ensure_opset(model, recipe.number.opset)
    nodes = {node.name: node for node in model.graph}
    for layer in recipe.layers:
        node = nodes.get(layer.node)
        if node is None:
            raise GraphError(
                f"{layer.node}: no such node", expected="the graph that was calibrated"
            )
        _LayerRewrite(model.graph, node, layer, recipe, deltas).apply()
    common.RemoveUnusedNodesPass()(model)
    return model


class _LayerRewrite:
    """One layer's nodes and initializers."""

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        layer: QuantLayer,
        recipe: QuantisationPlan,
        deltas: DeltaSource | None,
    ) -> None:
        self._graph, self._node, self._layer = graph, node, layer
        self._number, self._amax = recipe.number, recipe.amax
        self._rows = recipe.rows.get(layer.x)
        self._dtype = DTYPES[recipe.number.name]
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        self._x, self._weight = x, weight
        self._float = weight.dtype or ir.DataType.FLOAT
        is_apart = layer.name in recipe.apart and deltas is not None
        self._apart = deltas.apart(layer) if is_apart and deltas else None
        self._ops = tape.Tape()

    def apply(self) -> None:
        """Replace the node's inputs; add the rest behind it where it is kept apart."""
        if self._number.quantises_activations:
            self._node.replace_input_with(0, self._quantised_x())
        self._node.replace_input_with(1, self._dequantised_weight())
        self._graph.insert_before(self._node, self._ops.nodes)
        if self._apart is not None:
            self._add_rest(self._apart.down, self._apart.up)

    def _quantised_x(self) -> ir.Value:
        scale = self._number.scale(np.array(self._amax[self._layer.x]))
        zero = self._constant("x_zero", np.zeros(()), self._dtype)
        inputs = [self._constant("x_scale", scale, self._float), zero]
        stored = self._op("QuantizeLinear", [self._x, *inputs], "x_q")
        return self._op("DequantizeLinear", [stored, *inputs], "x_dq")

    def _dequantised_weight(self) -> ir.Value:
        layer = self._layer
        values = self._values()
        grid = weight_grid(values, layer, self._number, self._rows)
        stored = add_initializer(
            self._graph,
            f"{layer.name}.weight_q",
            layer.shape,
            lambda: grid.stored(self._values()),
            self._dtype,
        )
        scale = self._constant("weight_scale", grid.scale, self._float)
        attributes = (
            {"axis": grid.axis} if grid.scale.ndim == 1 else {"axis": 0, "block_size": INT4_BLOCK}
        )
        return self._op("DequantizeLinear", [stored, scale], "weight_dq", attributes)

    def _values(self) -> Array:
        if self._apart is not None:
            return self._apart.base
        constant = self._weight.const_value
        assert constant is not None
        values: Array = constant.numpy()
        return values

    def _add_rest(self, down: Array, up: Array) -> None:
        """Insert ``+ (x . down) . up`` between the product and its readers."""
        product, ops = self._node.outputs[0], tape.Tape()
        readers = list(product.uses())
        factors = [self._constant(n, v, self._float) for n, v in (("down", down), ("up", up))]
        low = ops.op("MatMul", [self._x, factors[0]], name=f"{self._layer.name}/down")
        rest = ops.op("MatMul", [low, factors[1]], name=f"{self._layer.name}/rest")
        total = ops.op("Add", [product, rest], name=f"{self._layer.name}/adapted")
        for value, step in ((low, "down"), (rest, "rest"), (total, "adapted")):
            value.name = f"{self._layer.name}/{step}_value"
        for user, place in readers:
            user.replace_input_with(place, total)
        self._graph.insert_after(self._node, ops.nodes)

    def _constant(self, name: str, values: Array, dtype: ir.DataType) -> ir.Value:
        return add_initializer(
            self._graph, f"{self._layer.name}.{name}", values.shape, lambda: values, dtype
        )

    def _op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        step: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        name = f"{self._layer.name}/{step}"
        value = self._ops.op(op_type, inputs, dict(attributes or {}), name=name)
        value.name = f"{name}_value"
        return value
