"""The element types of all values: what the exporter left out, and what our passes added."""

from __future__ import annotations

import onnx_ir as ir

from mtl_export.graph import names

_BOOL = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not",
     "Or", "Xor"}
)  # fmt: skip
_WHOLE = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})
# The input whose type the outputs take, where it is not the first.
_DATA_INPUT = {"Where": 1}


def type_values(graph: ir.Graph) -> None:
    """Give every value of ``graph`` without an element type its own, in graph order."""
    for node in graph:
        for value in node.outputs:
            known = _output_type(node) if value.dtype is None else None
            if known is not None:
                value.type = ir.TensorType(known)


def _output_type(node: ir.Node) -> ir.DataType | None:
    if node.domain == names.DOMAIN:
        return ir.DataType.FLOAT
    if node.op_type in _BOOL:
        return ir.DataType.BOOL
    if node.op_type in _WHOLE:
        return ir.DataType.INT64
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in {"Constant", "ConstantOfShape"}:
        given = node.attributes.get("value")
        return ir.DataType.FLOAT if given is None else given.as_tensor().dtype
    data = node.inputs[_DATA_INPUT.get(node.op_type, 0)]
    return None if data is None else data.dtype
