from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError, UsageError
from mtl_export.graph import functions
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from mtl_export.runtime.ort import OrtRunner
from mtl_export_calibration.deltas import DeltaSource, swallowed_layers
from mtl_export_calibration.formats import FORMATS, FP8, INT4, INT8, NumberFormat
from mtl_export_calibration.layers import find_layers
from mtl_export_calibration.qdq import QuantisationPlan, quantise
from mtl_export_calibration.weights import refusal, weight_grid

I, O = 64, 6  # noqa: E741 - the shapes' own names
RANGES = {"r": 2.5, "image": 4.5}
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
toy (float[batch, sequence, 64] x, float[batch, 2, 5, 5] image) =>
    (float[batch, sequence, 6] y, float[batch, sequence, 6] z, float[batch, 3, 3, 3] c)
{
    r = Relu (x)
    p = MatMul (r, q_weight)
    y = Add (p, q_bias)
    z = MatMul (r, k_weight)
    c = Conv <kernel_shape = [3, 3]> (image, conv_weight)
}
"""


def values() -> dict[str, Array]:
    """Return the weights; channels differ a hundredfold, one is all zeros."""
    generator = np.random.default_rng(2)
    spread = np.geomspace(0.01, 1.0, O)
    q = generator.normal(size=(I, O)) * spread
    q[:, 2] = 0.0
    found = {
        "q.weight_t": q,
        "q.bias": generator.normal(size=O),
        "k.weight_t": generator.normal(size=(I, O)) * spread[::-1],
        "conv.weight": generator.normal(size=(3, 2, 3, 3)) * spread[:3, None, None, None],
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def model() -> ir.Model:
    """Return two products that read the same x, and a convolution."""
    proto = onnx.parser.parse_model(GRAPH)
    parsed = {"q_weight": "q.weight_t", "k_weight": "k.weight_t", "q_bias": "q.bias"}
    parsed["conv_weight"] = "conv.weight"
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
        node.input[:] = [parsed.get(name, name) for name in node.input]
    for name, value in values().items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return ir.from_proto(proto)


def inputs() -> dict[str, Array]:
    """Return one batch."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(2, 4, I)).astype(np.float32)
    return {"x": x, "image": generator.normal(size=(2, 2, 5, 5)).astype(np.float32)}


def quantised(number: NumberFormat, path: Path) -> ir.Model:
    """Write the quantised graph to ``path``, check it and return it."""
    original = model()
    layers = [layer for layer in find_layers(original) if not refusal(layer, number)]
    result = quantise(original, QuantisationPlan(number, layers, RANGES))
    ir.save(result, path)
    onnx.checker.check_model(str(path), full_check=True)
    return result


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
def test_a_graph_computes_what_its_numbers_say(number: NumberFormat, tmp_path: Path) -> None:
    """By onnx's own evaluator: Q(x) . Q(W), as numpy computes it from the formats."""
    original, batch = model(), inputs()
    quantised(number, tmp_path / "model.onnx")
    y, z, c = map(np.asarray, ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, batch))
    x = np.maximum(batch["x"], 0)
    if number.quantises_activations:
        x = number.rounded(x, number.scale(np.array(RANGES["r"])))
    grids = {
        layer.name: weight_grid(values()[layer.weight], layer, number).rounded(
            values()[layer.weight]
        )
        for layer in find_layers(original)
        if not refusal(layer, number)
    }
    np.testing.assert_allclose(y, x @ grids["q"] + values()["q.bias"], atol=2e-5)
    np.testing.assert_allclose(z, x @ grids["k"], atol=2e-5)
    assert ("conv" in grids) == number.quantises_activations
    if number.quantises_activations:
        image = number.rounded(batch["image"], number.scale(np.array(RANGES["image"])))
        patches = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(2, 3))
        expected = np.einsum("bcijhw,ochw->boij", patches, grids["conv"])
        np.testing.assert_allclose(c, expected, atol=2e-5)


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
def test_onnxruntime_runs_every_format(number: NumberFormat, tmp_path: Path) -> None:
    """Its kernels may round a little otherwise (int4 products in 8 bits)."""
    quantised(number, tmp_path / "model.onnx")
    expected = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, inputs())
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        found = runner.infer(inputs())
    for name, value in zip(("y", "z", "c"), expected, strict=True):
        assert np.abs(found[name] - np.asarray(value)).max() < 0.02 * np.abs(value).max()


def test_zero_points_are_zero_and_weights_are_stored_small(tmp_path: Path) -> None:
    """Symmetric, per tensor for activations, per channel for weights, as TensorRT takes it."""
    result = quantised(INT8, tmp_path / "model.onnx")
    found = Counter(node.op_type for node in result.graph)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (3, 6)
    initializers = {n: v.const_value for n, v in result.graph.initializers.items() if v.const_value}
    assert not {"q.weight_t", "k.weight_t", "conv.weight"} & initializers.keys()
    assert initializers["q.weight_q"].dtype == ir.DataType.INT8
    assert initializers["q.weight_scale"].shape == ir.Shape([O])
    assert initializers["conv.weight_scale"].shape == ir.Shape([3])
    assert initializers["q.x_scale"].shape == ir.Shape([])
    assert not any(initializers[f"{name}.x_zero"].numpy().any() for name in ("q", "k", "conv"))


def test_onnxruntime_computes_int8_in_integers(tmp_path: Path) -> None:
    """Both products fuse, though they read the same x."""
    import onnxruntime

    quantised(INT8, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (2, 0)


def test_int4_raises_the_opset(tmp_path: Path) -> None:
    """4-bit integers exist from opset 21 on; other formats leave the opset alone."""
    result = quantised(INT4, tmp_path / "model.onnx")
    assert result.opset_imports[""] == 21
    assert quantised(FP8, tmp_path / "fp8.onnx").opset_imports[""] == 20
    weight = result.graph.initializers["q.weight_q"].const_value
    assert weight is not None
    assert (weight.dtype, weight.nbytes) == (ir.DataType.INT4, I * O / 2)


def test_operators_that_changed_forbid_a_higher_opset() -> None:
    """GroupNormalization means something else in opset 21."""
    original = model()
    node = ir.Node("", "GroupNormalization", [], num_outputs=1, name="norm")
    original.graph.append(node)
    layers = find_layers(original)[:1]
    with pytest.raises(GraphError, match="GroupNormalization"):
        quantise(original, QuantisationPlan(INT4, layers, {}))


def test_layers_are_found_by_their_module() -> None:
    """Products with weights, not their bias; heads and what the user names are left out."""
    names = [layer.name for layer in find_layers(model())]
    assert names == ["q", "k", "conv"]
    assert [layer.name for layer in find_layers(model(), heads=["k"])] == ["q", "conv"]
    assert [layer.name for layer in find_layers(model(), exclude=["^q$", "con"])] == ["k"]
    with pytest.raises(UsageError, match="found in no layer's name"):
        find_layers(model(), exclude=["query"])
    with pytest.raises(UsageError, match="not a regular expression"):
        find_layers(model(), exclude=["("])


def test_small_or_odd_weights_are_not_for_int4() -> None:
    """The reason is said."""
    layers = {layer.name: layer for layer in find_layers(model())}
    assert refusal(layers["conv"], INT4) == "int4 weights are for MatMul only"
    assert not any(refusal(layer, INT8) for layer in layers.values())


def routed() -> ir.Model:
    """Return two routed layers, adapted by three tasks."""
    from tests.graph import layers

    return layers.model()


def test_the_low_rank_path_stays_as_it_is() -> None:
    """Functions and their factors are not touched, and nothing of them counts as a layer."""
    original = SplitGemmPass()(routed()).model
    found = find_layers(original)
    assert {layer.op_type for layer in found} == {"MatMul"}
    assert len(found) == 2
    result = quantise(original, QuantisationPlan(INT8, found, {"x": 3.0}))
    calls = [node for node in result.graph if node.op_type == functions.TASK_DELTA]
    assert len(calls) == 2
    assert all(node.inputs[0] is not None and node.inputs[0].name == "x" for node in calls)


def adapted() -> tuple[ir.Model, BoundModel]:
    """Return a merged graph of the toy and what it was merged from."""
    from mtl_export.graph.passes.merge_task import MergeTaskPass
    from tests.graph import marked

    bound = marked.bound()
    return MergeTaskPass(bound, marked.TASKS[1])(marked.model()).model, bound


def test_a_delta_kept_apart_is_added_in_full(tmp_path: Path) -> None:
    """Base quantised, low-rank rest in float: with fine steps, the merged graph's numbers."""
    from tests.graph import marked

    merged, bound = adapted()
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = marked.evaluate(merged, x=x)
    again, _ = adapted()
    layers = [layer for layer in find_layers(again, heads=["head"])]
    source = DeltaSource(bound, marked.TASKS[1])
    proto = ir.to_proto(merged)
    names = [layer.x for layer in layers]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    seen = list(ReferenceEvaluator(proto).run(None, {"x": x}))[1:]
    ranges = {n: float(np.abs(v).max()) for n, v in zip(names, seen, strict=True)}
    recipe = QuantisationPlan(INT8, layers, ranges,
                    frozenset(one.name for one in layers))  # fmt: skip
    result = quantise(again, recipe, source)
    assert (
        sum(node.name.endswith("/rest") for node in result.graph if node.name) == len(layers) == 3
    )
    found = marked.evaluate(result, x=x)
    noise = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < noise < 0.05
    for layer in layers:
        apart = source.apart(layer)
        assert apart is not None
        weight = merged.graph.initializers[layer.weight].const_value
        assert weight is not None
        np.testing.assert_allclose(
            apart.base + apart.down @ apart.up, weight.numpy(), rtol=1e-5, atol=1e-5
        )


def test_a_step_that_swallows_a_change_is_reported() -> None:
    """A channel's step grows with its largest weight; a small delta disappears in it."""
    from tests.graph import marked

    merged, bound = adapted()
    layer = next(one for one in find_layers(merged) if one.name == "enc.wide")
    constant = merged.graph.initializers[layer.weight].const_value
    assert constant is not None
    weight = constant.numpy()
    single, one_task = DeltaSource(bound, None), DeltaSource(bound, marked.TASKS[1])
    assert single.swallowed(layer, INT8, weight) == {"a": 0.0, "b": 0.0, "c": 0.0}
    loud = weight.copy()
    loud[0, :4] = 5000.0  # four of seven channels
    shares = one_task.swallowed(layer, INT8, loud)
    assert shares == {"b": pytest.approx(4 / 7)}
    assert swallowed_layers({"enc.wide": shares}, ["b"]) == ["enc.wide"]
    assert swallowed_layers({"enc.wide": shares}, ["a"]) == []
