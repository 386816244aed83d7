"""A model without norms, so that a task's own large inputs stay large all the way.

    e = table[input_ids]    h = Relu(e . first)    m = mean over the sequence
    logits = (m . second) + bias

Two tasks: the tokens of "loud" have embeddings ``LOUDNESS`` times those of "quiet".
Every layer's name ends like those that mtl-export writes, so that quantisers find it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import Samples

FEATURES, LABELS, TOKENS, LENGTH = 64, 3, 40, 6
LOUDNESS = 6.0
TASKS = (
    Task("quiet", 0, ("x", "y", "z"), "single_label_classification"),
    Task("loud", 1, ("x", "y", "z"), "single_label_classification"),
)
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
toy (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
     int64[batch] task_ids) => (float[batch, 3] logits)
{
    e = Gather <axis = 0> (table, input_ids)
    h = MatMul (e, first_weight_t)
    r = Relu (h)
    axes = Constant <value_ints = [1]> ()
    m = ReduceMean <keepdims = 0> (r, axes)
    p = MatMul (m, second_weight_t)
    logits = Add (p, bias)
}
"""


def values(outlier: float = 0.0) -> dict[str, Array]:
    """Return the weights.

    Args:
        outlier: A feature of every embedding that no weight reads.
    """
    generator = np.random.default_rng(5)
    table = generator.normal(size=(TOKENS, FEATURES))
    table[TOKENS // 2 :] *= LOUDNESS
    first = generator.normal(size=(FEATURES, FEATURES)) / 4
    if outlier:
        table[:, 0], first[0] = outlier, 0.0
    found = {
        "table": table,
        "first_weight_t": first,
        "second_weight_t": generator.normal(size=(FEATURES, LABELS)),
        "bias": np.array([0.5, -0.5, 0.0]),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def write_graph(folder: Path, outlier: float = 0.0) -> Path:
    """Write ``model.onnx`` and a config to ``folder`` and return it."""
    proto = onnx.parser.parse_model(GRAPH)
    for name, value in values(outlier).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for node in proto.graph.node:
        node.name = node.output[0]
        for place, name in enumerate(node.input):
            node.input[place] = name.replace("_weight_t", ".weight_t")
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("_weight_t", ".weight_t")
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(folder / "model.onnx"))
    (folder / "config.json").write_text("{}\n")
    return folder


def bound() -> BoundModel:
    """Return the tasks without an adapter."""
    adapters = AdapterSet("toy", TASKS, {}, {}, "Toy", "0" * 64)
    base = BaseModel("toy", Path(), {}, {}, ())
    checkpoint = Checkpoint(Path(), "toy", "toy", TASKS, {}, {}, BaseReference(), "Toy", "0" * 64)
    return BoundModel(checkpoint, adapters, base, prefix="")


def samples(rows: int = 200, seed: int = 0) -> Samples:
    """Return as many rows of each task, without padding and labels."""
    generator = np.random.default_rng(seed)
    task_ids = np.arange(2 * rows) % 2
    ids = generator.integers(0, TOKENS // 2, (2 * rows, LENGTH)) + task_ids[:, None] * (TOKENS // 2)
    mask = np.ones_like(ids)
    return Samples({"input_ids": ids, "attention_mask": mask}, task_ids, np.full(2 * rows, -1))
