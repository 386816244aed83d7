"""Lower every marker to a layer whose low-rank part is an optional graph input.

What a task has of its own is fed by the caller, or by ONNX Runtime from an
``.onnx_adapter`` file: one task at a time, chosen for each run.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.adapters.base_layer import is_conv1d
from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.errors import GraphError
from mtl_export.graph import names
from mtl_export.graph.adapter_parameters import (
    Parameter,
    absent_parameter,
    bias_parameter,
    delta_parameters,
    factor_parameters,
    gain_parameter,
    head_parameters,
    own_parameter,
)
from mtl_export.graph.passes.markers import (
    ensure_no_markers,
    input_of,
    markers,
    module_of,
    replace_marker,
)
from mtl_export.graph.passes.routing import name_values
from mtl_export.graph.passes.weights import add_initializer


class AdapterInputPass(ir.passes.InPlacePass):
    """Replace the markers by layers that take one task's tensors as inputs with defaults.

    Cases
        1. ``TaskLinear(x, W, b)``, factors shared by all tasks  ->
           ``Add(Add(MatMul(x, W^T), x . down . core . up), b)``; core is an input.
        2. the same with factors of their own: down and up are inputs.
        3. gains, or a bias of their own: inputs as well.
        4. ``TaskHead(x)``  ->  ``Add(MatMul(x, weight_t), bias)``, both inputs.
        5. ``TaskEmbedding(ids)``  ->  ``Gather`` of the base and of an input down, times up;
           of a table that is an input where tasks trained vectors.
        6. ``TaskNorm(x)``  ->  ``LayerNormalization`` with weight and bias as inputs.
        7. a layer that one task adapts and another replaces: refused.
        8. ``TaskOutput(x)``  ->  ``Add(x, absent)``, an input: 0, or -inf where the task's
           answer is another output.

    Attributes:
        parameters: The inputs that were added, in graph order.
    """

    def __init__(self, bound: BoundModel) -> None:
        super().__init__()
        self._bound = bound
        self.parameters: list[Parameter] = []

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
            name_values(ops, result)
            replace_marker(node, ops, result)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that no marker is left."""
        ensure_no_markers(model)

    def _input(self, graph: ir.Graph, parameter: Parameter) -> ir.Value:
        value = add_initializer(graph, parameter.name, parameter.shape, parameter.default)
        if value.is_graph_input():
            return value  # of an earlier use of the module
        graph.inputs.append(value)
        self.parameters.append(parameter)
        return value

    def _linear(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module, x = module_of(node), input_of(node)
        layer = self._bound.adapters.layers.get(module)
        if f"{module}.weight" in self._bound.adapters.own_tensors:
            raise _mixed(module)
        base = self._bound.base_tensor(f"{module}.weight")
        is_transposed = is_conv1d(self._bound.base.config, module)
        weight = add_initializer(
            graph,
            names.weight_t(module),
            base.shape if is_transposed else base.shape[::-1],
            lambda: base.numpy() if is_transposed else base.numpy().T,
        )
        y = ops.op("MatMul", [x, weight], name=names.value(module, "matmul"))
        if layer is not None and (parameters := delta_parameters(layer)):
            factors = [self._input(graph, parameter) for parameter in parameters]
            if isinstance(layer, LayerAdapter):
                down, up = (
                    add_initializer(graph, names.part(module, name), value.shape, lambda v=value: v)  # type: ignore[misc]
                    for name, value in (("down", layer.down.T), ("up", layer.up.T))
                )
                factors = [down, *factors, up]
            delta = x
            for number, factor in enumerate(factors):
                name = names.value(module, f"delta{number}")
                delta = ops.op("MatMul", [delta, factor], name=name)
            y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
        if layer is not None and (gain := gain_parameter(layer)) is not None:
            factor = self._input(graph, gain)
            y = ops.op("Mul", [y, factor], name=names.value(module, "scaled"))
        own = bias_parameter(self._bound, module)
        traced = node.inputs[2] if len(node.inputs) > 2 else None
        bias = traced if own is None else self._input(graph, own)
        return y if bias is None else ops.op("Add", [y, bias], name=names.value(module, "add"))

    def _head(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        weight, bias = (self._input(graph, p) for p in head_parameters(self._bound, module))
        product = ops.op("MatMul", [input_of(node), weight], name=names.value(module, "matmul"))
        return ops.op("Add", [product, bias], name=names.value(module, "add"))

    def _embedding(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module, x = module_of(node), input_of(node)
        layer = self._bound.adapters.layers.get(module)
        name = names.value(module, "gather")
        if layer is None:
            table = self._input(graph, own_parameter(self._bound, module, "weight"))
            return ops.op("Gather", [table, x], {"axis": 0}, name=name)
        if f"{module}.weight" in self._bound.adapters.own_tensors:
            raise _mixed(module)
        key = f"{module}.weight"
        base = self._bound.base_tensor(key)
        table = graph.initializers.get(key) or add_initializer(graph, key, base.shape, base.numpy)
        y = ops.op("Gather", [table, x], {"axis": 0}, name=name)
        if factors := factor_parameters(layer):
            down, up = (self._input(graph, parameter) for parameter in factors)
            z = ops.op("Gather", [down, x], {"axis": 0}, name=names.value(module, "delta0"))
            delta = ops.op("MatMul", [z, up], name=names.value(module, "delta1"))
            y = ops.op("Add", [y, delta], name=names.value(module, "adapted"))
        gain = gain_parameter(layer)
        if gain is None:
            return y
        return ops.op("Mul", [y, self._input(graph, gain)], name=names.value(module, "scaled"))

    def _output(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        absent = self._input(graph, absent_parameter(self._bound, module))
        return ops.op("Add", [input_of(node), absent], name=names.value(module, names.ANSWERS))

    def _norm(self, graph: ir.Graph, node: ir.Node, ops: tape.Tape) -> ir.Value:
        module = module_of(node)
        own = [
            self._input(graph, own_parameter(self._bound, module, kind))
            for kind in ("weight", "bias")
        ]
        return ops.op(
            "LayerNormalization",
            [input_of(node), *own],
            {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()},
            name=names.value(module, "normalised"),
        )


def _mixed(module: str) -> GraphError:
    return GraphError(
        f"{module}: one task adapts this layer, another replaced it whole",
        expected="one or the other for all tasks, because the base weight stays in the graph",
        fix="Export this model per task: --layout per-task",
    )
