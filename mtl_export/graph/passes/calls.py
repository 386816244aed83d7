"""What the passes after routing share: find calls of our functions, and put nodes in place."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience, tape

from mtl_export.graph import functions, names


def calls(model: ir.Model, function: str) -> list[ir.Node]:
    """Return the calls of one of our functions in the main graph, in graph order."""
    return [n for n in model.graph if n.domain == names.DOMAIN and n.op_type == function]


def declare(model: ir.Model, function: str) -> None:
    """Add one of our functions to ``model``."""
    added = functions.FUNCTIONS[function](model.opset_imports[""])
    model.functions[added.identifier()] = added


def drop_uncalled(model: ir.Model) -> None:
    """Remove our functions that nothing calls any more."""
    called = {node.op_identifier() for node in model.graph.all_nodes()}
    for identifier in [key for key in model.functions if key[0] == names.DOMAIN]:
        if identifier not in called:
            del model.functions[identifier]


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that leaves none out."""
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != len(node.inputs):
        raise ValueError(f"{node.name} lacks an input")
    return inputs


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads ``value``; None if several do, or an output is it."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def insert_before(node: ir.Node, ops: tape.Tape) -> None:
    """Put the recorded nodes before ``node``; values without a name take their node's."""
    if node.graph is None:
        raise ValueError(f"{node.name} is in no graph")
    name_values(ops)
    node.graph.insert_before(node, ops.nodes)


def replace(node: ir.Node, ops: tape.Tape, result: ir.Value) -> None:
    """Put the recorded nodes in the place of ``node``, ``result`` in that of its output."""
    if node.graph is None:
        raise ValueError(f"{node.name} is in no graph")
    name_values(ops, result)
    convenience.replace_nodes_and_values(
        node.graph, node, [node], ops.nodes, node.outputs, [result]
    )


def name_values(ops: tape.Tape, result: ir.Value | None = None) -> None:
    """Name the recorded values, ``result`` aside, after the nodes that make them."""
    for node in ops.nodes:
        for index, value in enumerate(node.outputs):
            if value is not result:
                value.name = f"{node.name}_value{index or ''}"
