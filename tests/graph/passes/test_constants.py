from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtl_export.graph import functions
from mtl_export.graph.passes.constants import ConstantTensorsPass, short_constants

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[n] x) => (float[n] y) {
    f = Constant <value_float = 0.5> ()
    fs = Constant <value_floats = [0.1, -2.0]> ()
    i = Constant <value_int = 3> ()
    is = Constant <value_ints = [1, 2]> ()
    t = Constant <value = float {0.25}> ()
    y = Add (x, t)
}
"""
EXPECTED = {
    "f": np.array(0.5, np.float32), "fs": np.array([0.1, -2.0], np.float32), "i": np.array(3),
    "is": np.array([1, 2]), "t": np.array(0.25, np.float32),
}  # fmt: skip


def test_every_spelling_becomes_a_tensor_of_the_type_it_means() -> None:
    """Numbers are float32 and never double, whole ones int64; rank 0 and 1 stay apart."""
    result = ConstantTensorsPass()(ir.from_onnx_text(TEXT))
    assert result.modified
    found = {
        node.outputs[0].name: node.attributes["value"].as_tensor().numpy()
        for node in result.model.graph
        if node.op_type == "Constant"
    }
    assert found.keys() == EXPECTED.keys()
    for name, value in EXPECTED.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    assert not ConstantTensorsPass()(result.model).modified


def test_bodies_of_functions_are_rewritten() -> None:
    """Each of our functions, whose axes are constants."""
    model = ir.from_onnx_text(TEXT)
    for make in functions.FUNCTIONS.values():
        function = make(20)
        model.functions[function.identifier()] = function
    before = len(list(short_constants(model)))
    assert before > len(EXPECTED)
    ConstantTensorsPass()(model)
    assert not list(short_constants(model))
