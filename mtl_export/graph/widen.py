"""Let some parts of a half-precision graph compute in float32, by Casts around them.

    x -> layer -> y    ->    x -> Cast to float32 -> layer -> Cast back -> y

The weights stay what the file has, rounded to half precision; what is gained is the range of
float32 and its rounding inside the part. Two parts side by side have no Cast between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir
from onnx_ir import tape

from mtl_export.graph.passes.value_types import type_values
from mtl_export.graph.taps import owner

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# These make numbers out of none: they are cast where they are read.
SOURCES = frozenset({"Constant", "ConstantOfShape"})


def parts_of(model: ir.Model, modules: Iterable[str]) -> dict[str, list[ir.Node]]:
    """Return the parts that compute in half precision, in the order they run.

    A part is a layer by its name, or what lies ``after`` one and before the next.
    """
    type_values(model.graph)
    known = set(modules)
    found: dict[str, list[ir.Node]] = {}
    between = "before all layers"
    for node in model.graph:
        module = owner(node) if owner(node) in known else ""
        if module:
            between = f"after {module}"
        if node.op_type not in SOURCES and any(
            _is_half(value) for value in (*node.inputs, *node.outputs)
        ):
            found.setdefault(module or between, []).append(node)
    return found


def widen(model: ir.Model, modules: Iterable[str], chosen: Collection[str]) -> None:
    """Let the parts called ``chosen`` compute in float32; the rest stays as it is."""
    parts = parts_of(model, modules)
    nodes = {node for name in chosen for node in parts[name]}
    casts = _Casts(model.graph)
    ordered = [node for node in model.graph if node in nodes]
    for node in ordered:
        for index, value in enumerate(node.inputs):
            if value is not None and _is_half(value) and value.producer() not in nodes:
                node.replace_input_with(index, casts.of(value, ir.DataType.FLOAT))
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for node in ordered:
        for value in node.outputs:
            if _is_half(value):
                _narrow_outside(value, nodes, casts)


class _Casts:
    """Casts of a graph, one for each value and type, where the value is made."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        key = (value, wanted)
        if key not in self._made:
            name = f"{value.name}/bisect_{wanted.name.lower()}"
            ops = tape.Tape(self._graph)
            made = ops.op("Cast", [value], {"to": wanted}, name=name)
            made.name, made.type, made.shape = f"{name}_value", ir.TensorType(wanted), value.shape
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], ops.nodes)
            else:
                self._graph.insert_after(producer, ops.nodes)
            self._made[key] = made
        return self._made[key]


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in HALF


def _narrow_outside(value: ir.Value, inside: set[ir.Node], casts: _Casts) -> None:
    """Make ``value`` float32, and half again for whoever reads it from outside."""
    half = value.dtype
    assert half is not None
    users = [(node, index) for node, index in value.uses() if node not in inside]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = value.graph
    is_output = value.is_graph_output()
    if not users and not is_output:
        return
    back = casts.of(value, half)
    for node, index in users:
        node.replace_input_with(index, back)
    if is_output and graph is not None:
        name = value.name
        value.name, back.name = f"{name}/wide", name
        for index, output in enumerate(list(graph.outputs)):
            if output is value:
                graph.outputs[index] = back
