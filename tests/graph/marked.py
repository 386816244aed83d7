"""A small graph with every kind of marker, the adapter it belongs to, and its oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet, Head, LayerAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.tensors import Array
from tests.adapters.toys import memory_tensor

TASKS = (
    Task("a", 0, ("no", "yes"), "single_label_classification"),
    Task("b", 1, ("w", "x", "y", "z"), "single_label_classification"),
    Task("c", 2, ("score",), "regression"),
)
# module -> (outputs, inputs); the middle one has no bias
SIZES = {"enc.wide": (7, 5), "enc.narrow": (6, 7), "pool": (3, 6)}
BIASES = ("enc.wide", "pool")
HEAD = "head"
UPS, DOWNS = 4, 2
GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (float[batch, sequence, 5] x) => (float[batch, 4] logits)
<float[batch, sequence, 7] h, float[batch, sequence, 7] r, float[batch, sequence, 6] n,
 float[batch, 6] first, float[batch, 3] p>
{
    h = mtl_export.TaskLinear <module = "enc.wide"> (x, wide_weight, wide_bias)
    r = Relu (h)
    n = mtl_export.TaskLinear <module = "enc.narrow"> (r, narrow_weight)
    zero = Constant <value_int = 0> ()
    first = Gather <axis = 1> (n, zero)
    p = mtl_export.TaskLinear <module = "pool"> (first, pool_weight, pool_bias)
    logits = mtl_export.TaskHead <module = "head"> (p)
}
"""


def values() -> dict[str, Array]:
    """Return the base's tensors by their state-dict names."""
    generator = np.random.default_rng(0)
    tensors = {f"{m}.weight": generator.normal(size=s) for m, s in SIZES.items()}
    tensors |= {f"{m}.bias": generator.normal(size=SIZES[m][0]) + 1 for m in BIASES}
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def bound() -> BoundModel:
    """Return three tasks' adapter on these tensors, all in memory."""
    generator = np.random.default_rng(1)
    layers = {
        module: LayerAdapter(
            module,
            down=generator.normal(size=(DOWNS, inputs)).astype(np.float32),
            core=generator.normal(size=(len(TASKS), UPS, DOWNS)),
            up=generator.normal(size=(outputs, UPS)).astype(np.float32),
        )
        for module, (outputs, inputs) in SIZES.items()
    }
    heads = tuple(
        Head(
            generator.normal(size=(len(task.labels), 3)).astype(np.float32),
            generator.normal(size=len(task.labels)).astype(np.float32),
        )
        for task in TASKS
    )
    adapters = AdapterSet(
        family="mtl_lora", tasks=TASKS, layers=layers, heads={HEAD: heads}, model_class="Toy",
        checkpoint_sha256="",
    )  # fmt: skip
    checkpoint = Checkpoint(
        path=Path("memory"), format="memory", family="mtl_lora", tasks=TASKS, layers={}, heads={},
        base=BaseReference(), model_class="Toy", sha256="",
    )  # fmt: skip
    tensors = {name: memory_tensor(name, value) for name, value in values().items()}
    base = BaseModel("memory", Path("memory"), {}, tensors, ())
    return BoundModel(checkpoint, adapters, base, "")


def model(text: str = GRAPH) -> ir.Model:
    """Return the graph with its weights as initializers."""
    proto = onnx.parser.parse_model(text)
    for name, value in values().items():
        key = name.removeprefix("enc.").replace(".", "_")
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, key))
    return ir.from_proto(proto)


def logits(x: Array, task_ids: Array) -> Array:
    """Return float64 logits ``[B, 4]`` of rows x ``[B, S, 5]``, task by task, row by row."""
    adapters, tensors = bound().adapters, values()
    rows = np.full((len(x), 4), -np.inf)
    for row, task in enumerate(task_ids):
        weights = {m: tensors[f"{m}.weight"] + adapters.layers[m].delta(int(task)) for m in SIZES}
        h = np.maximum(x[row] @ weights["enc.wide"].T + tensors["enc.wide.bias"], 0)
        first = (h @ weights["enc.narrow"].T)[0]
        p = weights["pool"] @ first + tensors["pool.bias"]
        head = adapters.heads[HEAD][int(task)]
        rows[row, : len(head.bias)] = head.weight @ p + head.bias
    return rows


def evaluate(lowered: ir.Model, **inputs: Array) -> Array:
    """Return the graph's output by onnx's own reference evaluator, after a full check."""
    proto = ir.to_proto(lowered)
    onnx.checker.check_model(proto, full_check=True)
    return np.asarray(next(iter(ReferenceEvaluator(proto).run(None, inputs))))


def counts(lowered: ir.Model) -> dict[tuple[str, str], int]:
    """Return how many nodes there are of each domain and op type."""
    found: dict[tuple[str, str], int] = {}
    for node in lowered.graph.all_nodes():
        key = (node.domain, node.op_type)
        found[key] = found.get(key, 0) + 1
    return found
