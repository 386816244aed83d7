"""A quantised graph with its Q/DQ taken out again is the float graph, or it is told why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.passes.merge_task import MergeTaskPass
from mtl_export.parity.checks.dequantised import write_dequantised
from mtl_export.runtime.ort import OrtRunner
from mtl_export_calibration.deltas import DeltaSource
from mtl_export_calibration.formats import FORMATS, INT4, INT8, NumberFormat
from mtl_export_calibration.layers import find_layers
from mtl_export_calibration.qdq import QuantisationPlan, quantise
from mtl_export_calibration.weights import refusal
from tests.calibration import test_qdq as qdq
from tests.graph import marked

Change = Callable[[onnx.ModelProto], object]


def written(folder: Path, number: NumberFormat, **rows: Array) -> tuple[Path, Path]:
    """Write a float graph and its quantised one, and return both.

    Args:
        folder: For both.
        number: The format.
        rows: Of activations, that int4 weights are rounded for.
    """
    folder.mkdir(exist_ok=True)
    exact, rounded = folder / "float.onnx", folder / "model.onnx"
    ir.save(qdq.model(), exact)
    model = qdq.model()
    layers = [layer for layer in find_layers(model) if not refusal(layer, number)]
    ir.save(quantise(model, QuantisationPlan(number, layers, qdq.RANGES, rows=rows)), rounded)
    return exact, rounded


def change(path: Path, edit: Change) -> None:
    """Edit the graph at ``path``."""
    proto = onnx.load(path)
    edit(proto)
    onnx.save(proto, path)


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """Return an initializer."""
    found: onnx.TensorProto = next(one for one in proto.graph.initializer if one.name == name)
    return found


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
def test_what_is_left_is_the_float_graph(number: NumberFormat, tmp_path: Path) -> None:
    """No Q, no DQ, and every output bit for bit."""
    exact, rounded = written(tmp_path, number)
    plain = tmp_path / "plain.onnx"
    assert write_dequantised(rounded, exact, plain) == []
    operators = {node.op_type for node in onnx.load(plain).graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}
    generator = np.random.default_rng(0)
    inputs = {
        "x": generator.normal(size=(2, 3, qdq.I)).astype(np.float32),
        "image": generator.normal(size=(2, 2, 5, 5)).astype(np.float32),
    }
    with OrtRunner(exact, threads=1) as first, OrtRunner(plain, threads=1) as second:
        before, after = first.infer(inputs), second.infer(inputs)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def _other_weight(proto: onnx.ModelProto) -> None:
    stored = initializer(proto, "q.weight_q")
    values = onnx.numpy_helper.to_array(stored).copy()
    values[3, 4] += 1 if values[3, 4] < 100 else -1
    stored.CopyFrom(onnx.numpy_helper.from_array(values, stored.name))


def _other_scale(proto: onnx.ModelProto) -> None:
    scale = initializer(proto, "k.x_scale")
    wider = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, "wider")
    wider.name = "wider"
    proto.graph.initializer.append(wider)
    node = next(n for n in proto.graph.node if n.name == "k/x_dq")
    node.input[1] = "wider"


def _zero_point(proto: onnx.ModelProto) -> None:
    zero = initializer(proto, "q.x_zero")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), zero.name))


def _renamed(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.op_type == "MatMul").name = "other"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_other_weight, "1 weights of q are not the float graph's, rounded"),
        (_other_scale, "k/x_dq has not the scale of k/x_q"),
        (_zero_point, "q/x_q has a zero point that is not 0"),
        (_renamed, "a weight that the float graph does not have"),
    ],
)
def test_what_is_no_rounding_is_told(edit: Change, reason: str, tmp_path: Path) -> None:
    """One stored weight off by one, two scales, a zero point, an unknown product."""
    exact, rounded = written(tmp_path, INT8)
    change(rounded, edit)
    problems = write_dequantised(rounded, exact, tmp_path / "plain.onnx")
    assert any(reason in problem for problem in problems)


def test_weights_of_four_bits_are_rounded_up_or_down(tmp_path: Path) -> None:
    """As what they are fed asks; two steps away, or with half the scales, they are told."""
    seen = np.random.default_rng(1).normal(size=(40, 5)) @ np.random.default_rng(2).normal(
        size=(5, qdq.I)
    )
    exact, rounded = written(tmp_path, INT4, r=seen.astype(np.float32))
    nearest = onnx.load(written(tmp_path / "other", INT4)[1])
    proto = onnx.load(rounded)
    stored, other = (
        onnx.numpy_helper.to_array(initializer(one, "q.weight_q")) for one in (proto, nearest)
    )
    assert (stored != other).mean() > 0.05
    plain = tmp_path / "plain.onnx"
    assert write_dequantised(rounded, exact, plain) == []
    scale = initializer(proto, "k.weight_scale")
    half = onnx.numpy_helper.to_array(scale) / 2
    scale.CopyFrom(onnx.numpy_helper.from_array(half, scale.name))
    moved = stored.copy()
    moved[3, 4] += 2 if moved[3, 4] < 0 else -2
    initializer(proto, "q.weight_q").CopyFrom(onnx.numpy_helper.from_array(moved, "q.weight_q"))
    onnx.save(proto, rounded)
    problems = write_dequantised(rounded, exact, plain)
    assert "1 weights of q are not the float graph's, rounded" in problems
    assert any("weights of k are not the float graph's, rounded" in one for one in problems)


def test_a_change_that_was_kept_apart_is_no_difference(tmp_path: Path) -> None:
    """The base and the task's rest together are the merged weight."""
    bound, task = marked.bound(), marked.TASKS[1]
    model = MergeTaskPass(bound, task)(marked.model()).model
    exact, rounded = tmp_path / "float.onnx", tmp_path / "model.onnx"
    ir.save(model, exact)
    layers = find_layers(model, heads=bound.adapters.heads)
    apart = frozenset(layer.name for layer in layers)
    recipe = QuantisationPlan(INT8, layers, {layer.x: 4.0 for layer in layers}, apart)
    ir.save(quantise(model, recipe, DeltaSource(bound, task)), rounded)
    assert write_dequantised(rounded, exact, tmp_path / "plain.onnx") == []
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    with OrtRunner(exact, threads=1) as first, OrtRunner(tmp_path / "plain.onnx") as second:
        before, after = first.infer({"x": x})["logits"], second.infer({"x": x})["logits"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
