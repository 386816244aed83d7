from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir import tape

from mtl_export.graph.passes.markers import (
    ensure_no_markers,
    markers,
    module_of,
    replace_marker,
)
from tests.graph import marked

IN_A_BRANCH = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[batch, 6] first, bool c) => (float[batch, 3] y)
{
    y = If (c) <
        then_branch = t () => (float[batch, 3] a) {
            a = mtl_export.TaskLinear <module = "pool"> (first, pool_weight, pool_bias)
        },
        else_branch = e () => (float[batch, 3] b) {
            b = Gemm <transB = 1> (first, pool_weight, pool_bias)
        }
    >
}
"""
NEAR_MISS = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1, "vendor" : 1]>
toy (float[batch, 6] first) => (float[batch, 3] y)
{
    p = vendor.TaskLinear <module = "pool"> (first, pool_weight, pool_bias)
    y = mtl_export.TaskOther <module = "pool"> (p)
}
"""


def test_markers_are_found_in_graph_order() -> None:
    """All four markers and nothing else, with the module each stands for."""
    found = markers(marked.model())
    assert [module_of(node) for node in found] == ["enc.wide", "enc.narrow", "pool", "head"]


def test_markers_are_found_in_branches() -> None:
    """A marker inside a subgraph is a marker."""
    assert [module_of(node) for node in markers(marked.model(IN_A_BRANCH))] == ["pool"]


def test_the_same_name_elsewhere_is_no_marker() -> None:
    """TaskLinear of another domain and another op of ours are left alone."""
    model = marked.model(NEAR_MISS)
    assert markers(model) == []
    ensure_no_markers(model)


def test_a_marker_left_over_fails_with_its_module() -> None:
    """A graph with a marker in it is never handed on."""
    with pytest.raises(ir.passes.PostconditionError, match=r"enc\.narrow"):
        ensure_no_markers(marked.model())
    with pytest.raises(ir.passes.PostconditionError, match="pool"):
        ensure_no_markers(marked.model(IN_A_BRANCH))


def test_a_replaced_marker_hands_its_output_on() -> None:
    """Consumers and the graph output read the new value under the old name."""
    model = marked.model()
    node = markers(model)[-1]
    ops = tape.Tape(node.graph)
    result = ops.op("Identity", [node.inputs[0]])
    replace_marker(node, ops, result)
    assert node not in list(model.graph)
    assert model.graph.outputs[0] is result
    assert result.name == "logits"


def test_a_marker_outside_a_graph_cannot_be_replaced() -> None:
    """A node that belongs to no graph is a bug, said so."""
    node = ir.Node("mtl_export", "TaskHead", [])
    with pytest.raises(ValueError, match="no graph"):
        replace_marker(node, tape.Tape(), ir.Value(name="y"))
