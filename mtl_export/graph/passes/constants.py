"""Write every constant as the tensor it is.

    Constant(value_ints=[1])    ->    Constant(value=int64 [1])

ONNX knows six other ways to write one. Tools read them each in its own way, and some not at
all: as double where float is meant (onnxslim, Polygraphy's constant folding), or as no constant
(the shape inference of onnxruntime's transformer optimiser, which then fuses less).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir
from onnx_ir import convenience


class ConstantTensorsPass(ir.passes.InPlacePass):
    """Give each ``Constant`` the attribute ``value``, whoever wrote it.

    Cases
        1. ``value_float``, ``value_int``, ``value_string``: a tensor of rank 0, of float32, int64
           or text; ``value_floats`` and the like: of rank 1.
        2. ``value``, ``sparse_value``: left as it is.
        3. subgraphs and the bodies of functions: the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the constants of ``model``."""
        found = list(short_constants(model))
        for node in found:
            tensor = convenience.get_const_tensor(node.outputs[0])
            if tensor is None:
                raise ValueError(f"{node.name} refers to an attribute of its function")
            # Named after its value, which later passes rename.
            tensor.name = None
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Check that none is left."""
        for node in short_constants(model):
            raise ir.passes.PostconditionError(f"{node.name} holds no tensor")


def short_constants(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every constant of ``model`` that is written without a tensor."""
    bodies: Iterable[ir.Graph | ir.Function] = (model.graph, *model.functions.values())
    for body in bodies:
        for node in body.all_nodes():
            is_constant = node.op_type == "Constant" and not node.domain
            if is_constant and not {"value", "sparse_value"} & set(node.attributes):
                yield node
