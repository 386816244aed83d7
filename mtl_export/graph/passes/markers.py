"""Find the markers of a trace, and put what they become in their place."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir import convenience, tape

from mtl_export.graph import names

MARKERS = frozenset(
    {
        names.MARKER_LINEAR,
        names.MARKER_HEAD,
        names.MARKER_EMBEDDING,
        names.MARKER_NORM,
        names.MARKER_OUTPUT,
    }
)


def markers(model: ir.Model, op_types: frozenset[str] = MARKERS) -> list[ir.Node]:
    """Return every marker node of these kinds, subgraphs included, in graph order."""
    return [
        node
        for node in model.graph.all_nodes()
        if node.domain == names.DOMAIN and node.op_type in op_types
    ]


def module_of(node: ir.Node) -> str:
    """Return the dotted module name that a marker carries."""
    module: str = node.attributes[names.MODULE_ATTRIBUTE].as_string()
    return module


def number_uses(model: ir.Model) -> None:
    """Tell the markers of a module that is used several times apart."""
    found = markers(model)
    counts, seen = Counter(map(module_of, found)), Counter[str]()
    for node in found:
        module = module_of(node)
        seen[module] += 1
        if counts[module] > 1:
            numbers = (seen[module], counts[module])
            node.attributes[names.USE_ATTRIBUTE] = ir.AttrInt64s(names.USE_ATTRIBUTE, numbers)


def use_of(node: ir.Node) -> tuple[int, int]:
    """Return which use of its module a marker is, from 1 on, and of how many."""
    numbers = node.attributes.get(names.USE_ATTRIBUTE)
    if numbers is None:
        return 1, 1
    use, count = numbers.as_ints()
    return use, count


def layer_of(node: ir.Node) -> str:
    """Return the name of the module's use that a marker is (``names.used``)."""
    return names.used(module_of(node), use_of(node)[0])


def ensure_no_markers(model: ir.Model, op_types: frozenset[str] = MARKERS) -> None:
    """Fail if a marker of these kinds is left: no runtime could run it."""
    left = [module_of(node) for node in markers(model, op_types)]
    if left:
        raise ir.passes.PostconditionError(f"markers left in the graph: {left}")


def replace_marker(node: ir.Node, ops: tape.Tape, result: ir.Value) -> None:
    """Put the recorded nodes where the marker was; ``result`` takes over its output."""
    if node.graph is None:
        raise ValueError(f"marker {node.name} is in no graph")
    _name_use(ops, module_of(node), layer_of(node))
    convenience.replace_nodes_and_values(
        node.graph, node, [node], ops.nodes, node.outputs, [result]
    )


def _name_use(ops: tape.Tape, module: str, layer: str) -> None:
    """Give recorded nodes and values the name of this use of the module."""
    before, after = names.value(module, ""), names.value(layer, "")
    for node in ops.nodes:
        named: list[ir.Node | ir.Value] = [node, *node.outputs]
        for one in named:
            if one.name is not None and one.name.startswith(before):
                one.name = after + one.name.removeprefix(before)


def input_of(node: ir.Node) -> ir.Value:
    """Return what a marker works on."""
    x = node.inputs[0]
    if x is None:
        raise ValueError(f"marker {node.name} has no input")
    return x


def rank(x: ir.Value) -> int:
    """Return the number of dimensions, 0 where it is unknown."""
    return len(x.shape) if x.shape is not None else 0


def is_batch_first(x: ir.Value) -> bool:
    """Return whether the traced sizes alone say that row b belongs to row b of the batch."""
    first = x.shape[0] if x.shape is not None and rank(x) > 1 else None
    return isinstance(first, ir.SymbolicDim) and first.value == names.BATCH
