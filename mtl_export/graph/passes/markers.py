"""Find the markers of a trace."""

from __future__ import annotations

import onnx_ir as ir

from mtl_export.graph import names

_MARKERS = frozenset({names.MARKER_LINEAR, names.MARKER_HEAD})


def markers(model: ir.Model) -> list[ir.Node]:
    """Return every marker node, subgraphs included, in graph order."""
    return [
        node
        for node in model.graph.all_nodes()
        if node.domain == names.DOMAIN and node.op_type in _MARKERS
    ]


def module_of(node: ir.Node) -> str:
    """Return the dotted module name that a marker carries."""
    module: str = node.attributes[names.MODULE_ATTRIBUTE].as_string()
    return module


def ensure_no_markers(model: ir.Model) -> None:
    """Fail if a marker is left: no runtime could run it."""
    left = [module_of(node) for node in markers(model)]
    if left:
        raise ir.passes.PostconditionError(f"markers left in the graph: {left}")
