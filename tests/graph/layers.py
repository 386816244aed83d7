"""Two routed layers that read the same x, as routing leaves them, and their oracle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import functions
from mtl_export.graph.passes.calls import declare
from mtl_export.graph.passes.stacks import with_poison

TASKS, DOWN, IN = 3, 2, 5
# layer -> outputs, up-projection's columns; query's bias meets a Reshape, wide's a Relu
SIZES = {"query": (6, 4), "wide": (7, 3)}
GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[batch, sequence, 5] x, int64[batch] task_ids) =>
    (float[batch, sequence, 2, 3] q, float[batch, sequence, 7] w)
{
    query_product = MatMul (x, query_weight_t)
    query_delta = mtl_export.TaskDelta (x, task_ids, query_down, query_core, query_up)
    query_adapted = Add (query_product, query_delta)
    query_y = Add (query_adapted, query_bias)
    shape = Constant <value_ints = [0, 0, 2, 3]> ()
    q = Reshape (query_y, shape)
    wide_product = MatMul (x, wide_weight_t)
    wide_delta = mtl_export.TaskDelta (x, task_ids, wide_down, wide_core, wide_up)
    wide_adapted = Add (wide_product, wide_delta)
    wide_y = Add (wide_adapted, wide_bias)
    w = Relu (wide_y)
}
"""


def values(sizes: Mapping[str, tuple[int, int]] = SIZES) -> dict[str, Array]:
    """Return the initializers; slice T of each core is NaN."""
    generator = np.random.default_rng(4)
    found: dict[str, Array] = {}
    for layer, (outputs, ups) in sizes.items():
        found[f"{layer}_weight_t"] = generator.normal(size=(IN, outputs))
        found[f"{layer}_bias"] = generator.normal(size=outputs)
        found[f"{layer}_down"] = generator.normal(size=(IN, DOWN))
        found[f"{layer}_core"] = with_poison(generator.normal(size=(TASKS, DOWN, ups)))
        found[f"{layer}_up"] = generator.normal(size=(ups, outputs))
    return {name: value.astype(np.float32) for name, value in found.items()}


def model(text: str = GRAPH, sizes: Mapping[str, tuple[int, int]] = SIZES) -> ir.Model:
    """Return the graph, its weights as initializers, its nodes named as routing names them."""
    proto = onnx.parser.parse_model(text)
    for name, value in values(sizes).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node in proto.graph.node:
        node.name = node.output[0].replace("_", "/", 1)
    parsed = ir.from_proto(proto)
    declare(parsed, functions.TASK_DELTA)
    return parsed


def oracle(x: Array, task_ids: Array) -> tuple[Array, Array]:
    """Return q and w of rows x ``[B, S, 5]``, row by row."""
    v = values()

    def layer(name: str) -> Array:
        return np.stack(
            [
                row @ v[f"{name}_weight_t"]
                + row @ v[f"{name}_down"] @ v[f"{name}_core"][task] @ v[f"{name}_up"]
                + v[f"{name}_bias"]
                for row, task in zip(x, task_ids, strict=True)
            ]
        )

    wide = layer("wide")
    with np.errstate(invalid="ignore"):
        return layer("query").reshape(*x.shape[:2], 2, 3), np.where(wide < 0, 0, wide)
