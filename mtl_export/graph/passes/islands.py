"""Which nodes of a half-precision graph go on computing in float32.

Statistics square and sum many numbers, exponentials overflow, positions do not fit into the
ten bits of a float16 (7 of a bfloat16), and what becomes an index must not be rounded.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from mtl_export.graph import names

# Squares of 256 overflow a float16; LayerNormalization keeps its statistics in float32 itself.
WIDE_OPS = frozenset(
    {
        "CumSum", "Exp", "Log", "LogSoftmax", "Pow", "Range", "ReduceL2", "ReduceLogSumExp",
        "ReduceMean", "ReduceSum", "ReduceSumSquare", "Reciprocal", "Softmax", "Softplus", "Sqrt",
    }
)  # fmt: skip
# What they are computed from decides: angles, and logarithms of distances.
PRECISE_OPS = frozenset({"Cos", "Sin", "Log", "Range", "CumSum"})
# Between two islands, these take what they are given: x^2 -> mean -> + epsilon -> root.
JOINING_OPS = frozenset({"Add", "Div", "Mul", "Neg", "Sub", "Reshape", "Squeeze", "Unsqueeze"})
# An index that was rounded points elsewhere.
WHOLE = frozenset({ir.DataType.INT32, ir.DataType.INT64})


def islands(nodes: Iterable[ir.Node], dtype: ir.DataType) -> set[ir.Node]:
    """Return the nodes that stay in float32.

    Args:
        nodes: All nodes of a graph, in order, their values typed.
        dtype: FLOAT16 or BFLOAT16.
    """
    ordered = [node for node in nodes if touches_floats(node)]
    found = {n for n in ordered if n.domain != names.DOMAIN and _is_wide(n, dtype)}
    for node in ordered:
        if _needs_exact_inputs(node):
            found |= {node} | _ancestors(node)
    while joined := {node for node in ordered if node not in found and _joins(node, found)}:
        found |= joined
    return found


def is_float(value: ir.Value | None) -> bool:
    """Return whether ``value`` is float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def touches_floats(node: ir.Node) -> bool:
    """Return whether a node reads or makes float32."""
    return any(is_float(value) for value in [*node.inputs, *node.outputs])


def _is_wide(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type in WIDE_OPS or not _is_allowed(node, dtype)


def _is_allowed(node: ir.Node, dtype: ir.DataType) -> bool:
    """Return whether the operator's schema has this type where the node has float32."""
    import onnx

    version = node.version or (node.graph.opset_imports.get(node.domain) if node.graph else None)
    if version is None or node.op_type in {"Cast", "Constant"}:
        return True
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    wanted = f"tensor({dtype.name.lower()})"
    for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        if not formals:
            continue
        for index, value in enumerate(values):
            formal = formals[min(index, len(formals) - 1)]
            types = allowed.get(formal.type_str, {formal.type_str})
            if is_float(value) and wanted not in types:
                return False
    return True


def _needs_exact_inputs(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return node.outputs[0].dtype in WHOLE and is_float(node.inputs[0])
    return node.op_type in PRECISE_OPS or node.name == names.NEAR


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """Return the nodes that compute the float32 inputs of ``node``, back to whole numbers."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None and is_float(value) else None
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _joins(node: ir.Node, found: set[ir.Node]) -> bool:
    """Return whether a node only carries numbers from island to island."""
    if node.op_type not in JOINING_OPS or node.outputs[0].is_graph_output():
        return False
    producers = [
        value.producer()
        for value in node.inputs
        if value is not None and is_float(value) and not _is_fixed(value)
    ]
    users = node.outputs[0].consumers()
    return (
        bool(producers)
        and bool(users)
        and all(producer in found for producer in producers)
        and all(user in found for user in users)
    )


def _is_fixed(value: ir.Value) -> bool:
    if value.is_initializer():
        return True
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"
