"""Small ONNX files shaped like the ones this project exports, with seeded weights.

``write_routed`` has what makes the single graph special: dynamic ``batch`` and
``sequence``, int64 ``task_ids``, a low-rank part as a model-local function in domain
``mtl_export`` that gathers from a table with one NaN row more than there are tasks, and
a Where that sends every bad id to that row. ``write_merged`` is one task of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by name once this is imported
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mtl_export.tensorrt import BuildOptions, EngineManifest, build_engine, default_profile
from mtl_export.tensorrt.callbacks import Progress

RTX = "tensorrt_rtx"
DOMAIN = "mtl_export"
OPSET = 21
VOCABULARY, HIDDEN, RANK, LABELS = 50, 24, 4, 5
TASKS = ("ads_rel", "sentiment", "spam")
FLOATS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def write_routed(
    folder: Path, *, seed: int = 0, dtype: str = "float32", external: bool = True
) -> Path:
    """Write the single graph of three tasks to ``folder`` and return its path."""
    random = np.random.default_rng(seed)
    core = random.standard_normal((len(TASKS), RANK, RANK)).astype(dtype)
    poison = np.full((1, RANK, RANK), np.nan, dtype)
    weights = _base_weights(random, dtype) | {
        "dense.down": random.standard_normal((RANK, HIDDEN)).astype(dtype),
        "dense.core": np.concatenate([core, poison]),
        "dense.up": random.standard_normal((HIDDEN, RANK)).astype(dtype),
        "zero": np.array(0, np.int64),
        "task_count": np.array(len(TASKS), np.int64),
    }
    nodes = [
        helper.make_node("Less", ["task_ids", "zero"], ["negative"], name="negative"),
        helper.make_node("GreaterOrEqual", ["task_ids", "task_count"], ["large"], name="large"),
        helper.make_node("Or", ["negative", "large"], ["bad"], name="bad"),
        helper.make_node("Where", ["bad", "task_count", "task_ids"], ["rows"], name="guard"),
        helper.make_node("Gather", ["embeddings", "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "dense.weight"], ["base"], name="dense"),
        helper.make_node(
            "TaskLowRank",
            ["x", "dense.down", "dense.core", "dense.up", "rows"],
            ["delta"],
            domain=DOMAIN,
            name="low_rank",
        ),
        helper.make_node("Add", ["base", "delta"], ["sum"], name="sum"),
        *_tail("sum"),
    ]
    inputs = [_ids(), helper.make_tensor_value_info("task_ids", TensorProto.INT64, ["batch"])]
    return _save(
        folder, nodes, inputs, weights, dtype, external, layout="single-graph", tasks=TASKS
    )


def write_merged(
    folder: Path,
    *,
    seed: int = 0,
    task: str = TASKS[0],
    dtype: str = "float32",
    external: bool = True,
    pool_axis: int = 1,
) -> Path:
    """Write one merged task to ``folder`` and return its path.

    Args:
        folder: Where to.
        seed: Of the weights, and of nothing else.
        task: Named in the metadata and in the graph's name.
        dtype: Of the weights.
        external: Whether weights lie in ``model.onnx.data``.
        pool_axis: A constant that shapes the graph: another one is another structure.
    """
    weights = _base_weights(np.random.default_rng(seed), dtype)
    weights["pool_axis"] = np.array([pool_axis], np.int64)
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "dense.weight"], ["sum"], name="dense"),
        *_tail("sum"),
    ]
    return _save(folder, nodes, [_ids()], weights, dtype, external, layout="merged", tasks=(task,))


def write_graph(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write any graph, unchecked, weights inside, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        outputs,
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def write_decode(folder: Path) -> Path:
    """Write a graph with the inputs of ``decode`` and return its path."""
    shapes: dict[str, list[int | str]] = {
        "input_ids": ["batch", 1],
        "attention_mask": ["batch", "past + 1"],
        "past_key_values.0.key": ["batch", 2, "past", 4],
    }
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "past + 1"])
    return write_graph(
        folder, [helper.make_node("Relu", ["attention_mask"], ["y"])], inputs, [output]
    )


def routed_inputs(batch: int = 3, sequence: int = 7, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return inputs for the routed graph, the tasks in turn."""
    random = np.random.default_rng(seed)
    return {
        "input_ids": random.integers(0, VOCABULARY, (batch, sequence), np.int64),
        "task_ids": np.arange(batch, dtype=np.int64) % len(TASKS),
    }


def build_rtx(
    path: Path, engine: Path, *, progress: Progress | None = None, **options: object
) -> EngineManifest:
    """Return the manifest of an engine with the default profile, by TensorRT-RTX."""
    profile = default_profile(path, max_batch=4, max_sequence=16)
    return build_engine(
        path,
        engine,
        BuildOptions([profile] if profile.shapes else [], **options),  # type: ignore[arg-type]
        progress=progress,
        library_name=RTX,
    )


def graph_value(
    name: str, shape: list[int | str], kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    """Return a graph input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def names_in(folder: Path) -> list[str]:
    """Return the names in ``folder``."""
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def merged_and_nothing_new(folder: Path) -> Iterator[Path]:
    """Yield a merged graph and expect no file beside it afterwards."""
    path = write_merged(folder)
    before = names_in(folder)
    yield path
    assert names_in(folder) == before


def _base_weights(random: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "embeddings": random.standard_normal((VOCABULARY, HIDDEN)).astype(dtype),
        "dense.weight": random.standard_normal((HIDDEN, HIDDEN)).astype(dtype),
        "dense.bias": random.standard_normal(HIDDEN).astype(dtype),
        "head.weight": random.standard_normal((HIDDEN, LABELS)).astype(dtype),
        "pool_axis": np.array([1], np.int64),
    }


def _ids() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])


def _tail(value: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Add", [value, "dense.bias"], ["hidden"], name="bias"),
        helper.make_node(
            "ReduceMean", ["hidden", "pool_axis"], ["pooled"], keepdims=0, name="mean"
        ),
        helper.make_node("MatMul", ["pooled", "head.weight"], ["logits"], name="head"),
    ]


def _low_rank() -> onnx.FunctionProto:
    steps = [
        helper.make_node("Gather", ["core", "rows"], ["own"], axis=0, name="own_core"),
        helper.make_node("Transpose", ["down"], ["down_t"], perm=[1, 0], name="down_t"),
        helper.make_node("Transpose", ["own"], ["own_t"], perm=[0, 2, 1], name="core_t"),
        helper.make_node("Transpose", ["up"], ["up_t"], perm=[1, 0], name="up_t"),
        helper.make_node("MatMul", ["x", "down_t"], ["z"], name="down"),
        helper.make_node("MatMul", ["z", "own_t"], ["mixed"], name="core"),
        helper.make_node("MatMul", ["mixed", "up_t"], ["y"], name="up"),
    ]
    names = ["x", "down", "core", "up", "rows"]
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, "TaskLowRank", names, ["y"], steps, opsets)


def _save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
    dtype: str,
    external: bool,
    *,
    layout: str,
    tasks: tuple[str, ...],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    output = helper.make_tensor_value_info("logits", FLOATS[dtype], ["batch", LABELS])
    graph = helper.make_graph(
        nodes,
        "-".join(tasks),
        inputs,
        [output],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(
        graph,
        functions=[_low_rank()] if layout == "single-graph" else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    table = [
        {"name": name, "index": index, "labels": LABELS, "kind": "classification"}
        for index, name in enumerate(tasks)
    ]
    helper.set_model_props(
        model,
        {
            "mtl_export.version": "0.1.0",
            "mtl_export.layout": layout,
            "mtl_export.family": "mtl-lora",
            "mtl_export.tasks": json.dumps(table),
            "mtl_export.base_sha256": "0" * 64,
        },
    )
    onnx.checker.check_model(model)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=external,
        location="model.onnx.data",
        size_threshold=0,
    )
    return folder / "model.onnx"
