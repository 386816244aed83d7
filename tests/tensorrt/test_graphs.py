"""Small graphs of one kind each become engines: Q/DQ, branches, gathered heads, fixed shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.tensorrt.models import build_rtx, graph_value, write_graph

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_quantised_graph_builds_and_names_its_type(tmp_path: Path, kind: str) -> None:
    """Explicit symmetric Q/DQ, per tensor and per channel, needs no switch."""
    random = np.random.default_rng(0)
    weights = {
        "weight": random.integers(-9, 9, (8, 6)).astype(kind),
        "weight_scale": random.uniform(0.01, 0.02, 6).astype(np.float32),
        "weight_zero": np.zeros(6, kind),
        "scale": np.array(0.05, np.float32),
        "zero": np.zeros((), kind),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node(
            "DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=1
        ),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    inputs, outputs = [graph_value("x", ["batch", 8])], [graph_value("y", ["batch", 6])]
    path = write_graph(tmp_path, nodes, inputs, outputs, weights)
    assert build_rtx(path, tmp_path / "model.engine").precision == tuple(sorted(("float32", kind)))


def test_weight_only_int4_builds(tmp_path: Path) -> None:
    """Blocks of 64 rows share a scale, as calibrate writes them; -8 is used."""
    random = np.random.default_rng(0)
    weights = {
        "weight": random.integers(-8, 8, (128, 32)).astype("int4"),
        "scale": random.uniform(0.01, 0.02, (2, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], axis=0, block_size=64),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    inputs, outputs = [graph_value("x", ["batch", 128])], [graph_value("y", ["batch", 32])]
    path = write_graph(tmp_path, nodes, inputs, outputs, weights)
    assert "int4" in build_rtx(path, tmp_path / "model.engine").precision


def test_if_builds(tmp_path: Path) -> None:
    """Branches on a run-time condition."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_y"])],
            name,
            [],
            [graph_value(f"{name}_y", ["batch", 4])],
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    node = helper.make_node(
        "If", ["flag"], ["y"], then_branch=branches["then"], else_branch=branches["else"]
    )
    inputs = [graph_value("x", ["batch", 4]), graph_value("flag", [], TensorProto.BOOL)]
    path = write_graph(tmp_path, [node], inputs, [graph_value("y", ["batch", 4])])
    assert build_rtx(path, tmp_path / "model.engine").engine_size_bytes > 0


def test_fixed_shapes_need_no_profile(tmp_path: Path) -> None:
    """A graph without dynamic inputs builds with none."""
    path = write_graph(
        tmp_path,
        [helper.make_node("Relu", ["x"], ["y"])],
        [graph_value("x", [2, 3])],
        [graph_value("y", [2, 3])],
    )
    assert build_rtx(path, tmp_path / "model.engine").profiles == ()


def test_gathered_heads_build(tmp_path: Path) -> None:
    """Each row its task's head, padded to the widest with minus infinity."""
    random = np.random.default_rng(0)
    heads = random.standard_normal((3, 8, 5)).astype(np.float32)
    bias = np.zeros((3, 5), np.float32)
    bias[1, 2:] = -np.inf
    nodes = [
        helper.make_node("Gather", ["heads", "task_ids"], ["own"]),
        helper.make_node("Unsqueeze", ["x", "middle"], ["row"]),
        helper.make_node("MatMul", ["row", "own"], ["product"]),
        helper.make_node("Squeeze", ["product", "middle"], ["flat"]),
        helper.make_node("Gather", ["bias", "task_ids"], ["own_bias"]),
        helper.make_node("Add", ["flat", "own_bias"], ["logits"]),
    ]
    inputs = [graph_value("x", ["batch", 8]), graph_value("task_ids", ["batch"], TensorProto.INT64)]
    weights: dict[str, np.ndarray] = {
        "heads": heads,
        "bias": bias,
        "middle": np.array([1], np.int64),
    }
    path = write_graph(tmp_path, nodes, inputs, [graph_value("logits", ["batch", 5])], weights)
    manifest = build_rtx(path, tmp_path / "model.engine")
    assert set(manifest.profiles[0].shapes) == {"x", "task_ids"}
