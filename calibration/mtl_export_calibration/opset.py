"""Raise a graph to opset 21, which 4-bit integers need; refused where meaning would change.

Between 20 and 21 all operators kept their meaning and only took more types, save
GroupNormalization, whose scale and bias changed their shape. So the number is raised and
nothing else. Source: https://github.com/onnx/onnx/blob/v1.16.0/docs/Changelog.md, "Version 21".
"""

from __future__ import annotations

import onnx_ir as ir

from mtl_export.errors import GraphError

_OLDEST = 20
_CHANGED = frozenset({"GroupNormalization"})
# The file format that opset 21 came with.
_IR_VERSION = 10


def ensure_opset(model: ir.Model, needed: int) -> None:
    """Raise ``model`` and its functions to opset ``needed`` where they have less.

    Raises:
        GraphError: They are too old, or use an operator whose meaning would change.
    """
    own = model.opset_imports.get("", _OLDEST)
    if own >= needed:
        return
    graphs = [model.graph, *model.functions.values()]
    changed = sorted({n.op_type for g in graphs for n in g if n.op_type in _CHANGED})
    if own < _OLDEST or changed:
        with_changed = f" with {changed[0]}" if changed else ""
        raise GraphError(
            f"graph: opset {own}{with_changed}",
            expected=f"opset {needed}, or {_OLDEST} without operators that changed since",
            fix="Export it again with mtl-export onnx --force, or quantise to int8",
        )
    model.ir_version = max(model.ir_version, _IR_VERSION)
    model.opset_imports[""] = needed
    for function in model.functions.values():
        function.opset_imports[""] = needed
