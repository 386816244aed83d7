"""Lower the markers of LayerNorms to normalisations that serve all tasks."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph import names
from mtl_export.graph.passes.markers import input_of, module_of
from mtl_export.graph.passes.own_tensors import task_tensor
from mtl_export.graph.passes.routing import RoutePass, name_values
from mtl_export.graph.passes.weights import add_initializer


class RouteNormsPass(RoutePass):
    """Replace TaskNorm by LayerNormalization and each row's own scale and bias.

    Cases
        1. tasks trained the bias  ->  ``Add(LayerNormalization(x, w), biases[ids])``
        2. tasks trained the weight, or both  ->
           ``Add(Mul(LayerNormalization(x, 1), weights[ids]), biases[ids])``
        3. x whose rows cannot be told apart (``row_view``): refused.
    """

    op_types: ClassVar[frozenset[str]] = frozenset({names.MARKER_NORM})

    def lower(self, graph: ir.Graph, node: ir.Node, ids: ir.Value, ops: tape.Tape) -> ir.Value:
        """Record one normalisation."""
        module, x = module_of(node), input_of(node)
        name = f"{module}.weight"
        shared = node.inputs[1]
        has_own_weights = name in self._bound.adapters.own_tensors
        if has_own_weights or shared is None:
            features = self._bound.base_tensor(name).shape
            shared = add_initializer(
                graph, names.part(module, "ones"), features, lambda: np.ones(features)
            )
        y = ops.op(
            "LayerNormalization",
            [x, shared],
            {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()},
            name=names.value(module, "normalised"),
        )
        if has_own_weights:
            weights = self.vectors(graph, module, "weights", self._own(name), x, ids, ops)
            y = ops.op("Mul", [y, weights], name=names.value(module, "scaled"))
        biases = self.vectors(graph, module, "biases", self._own(names.bias(module)), x, ids, ops)
        y = ops.op("Add", [y, biases], name=names.value(module, "add"))
        name_values(ops, y)
        return y

    def _own(self, name: str) -> np.ndarray:
        """Return the tensor of every task, ``[T, I]``."""
        tasks = self._bound.adapters.tasks
        return np.stack([task_tensor(self._bound, name, task.index) for task in tasks])
