from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, GraphError
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.passes.precision import PrecisionPass, narrowed
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph
from mtl_export.names import DTYPE_KEY
from mtl_export.parity.tolerance import FLOOR_FACTOR, noise_floor
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.adapters import toys
from tests.graph import language, marked

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
BOTH = pytest.mark.parametrize("dtype", sorted(HALF))
ISLANDS = """
<ir_version: 10, opset_import: ["" : 20]>
toy (float[batch, 3] x, int64[batch] positions) => (float[batch, 3] y)
<float[3] weight = {1.5, 2.5, 3.5}, float eps = {1e-12}, float two = {2.0}, float low = {-3.4e38}>
{
    squares = Pow (x, two)
    axes = Constant <value_ints = [1]> ()
    mean = ReduceMean (squares, axes)
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    normal = Div (x, root)
    place = Cast <to = 1> (positions)
    angle = Cos (place)
    column = Unsqueeze (angle, axes)
    turned = Mul (normal, column)
    zero = Sub (two, two)
    masked = Mul (zero, low)
    sum = Add (turned, masked)
    y = Mul (sum, weight)
}
"""


@pytest.fixture(scope="module")
def language_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[BoundModel, TracedModel]:
    """Return a tiny LLaMA with logits for every token: RMSNorm, rotary positions, a mask."""
    bound = language.language_bound(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")
    return bound, trace(bound)


def oracle(bound: BoundModel, dtype: str, inputs: Mapping[str, Array]) -> Array:
    """Return the unmerged model's logits."""
    with OracleRunner(bound, dtype) as runner:
        return runner.infer(inputs)["logits"]


def written(model: ir.Model, bound: BoundModel, folder: Path) -> Path:
    """Return the graph's file after onnx's full check."""
    write_graph(model, bound, folder, None)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def half(model: ir.Model, dtype: str) -> ir.Model:
    """Return the graph in that type."""
    return PrecisionPass(dtype)(model).model


def test_an_encoder_in_fp16_errs_as_pytorch_in_fp16_does(
    bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """Mixed tasks, padded rows: within the tolerance; absent labels -inf, bad ids NaN."""
    path = written(half(routed_graph(traced, bound), "fp16"), bound, tmp_path)
    inputs = toys.token_rows(6, 13)
    inputs["task_ids"] = np.array([0, 1, 2, 2, 1, 0])
    exact = oracle(bound, "fp64", inputs)
    floor = noise_floor(exact, oracle(bound, "fp16", inputs), "fp16")
    with OrtRunner(path, threads=1) as runner:
        found = runner.infer(inputs)["logits"]
        bad = runner.infer({**inputs, "task_ids": np.array([0, 1, 9, 2, -1, 0])})["logits"]
    finite = np.isfinite(exact)
    error = np.abs(found[finite] - exact[finite]).max()
    assert 0 < error <= FLOOR_FACTOR * floor
    np.testing.assert_array_equal(np.isneginf(found), ~finite)
    assert np.isnan(bad[[2, 4]]).all()
    np.testing.assert_array_equal(bad[[0, 1, 3, 5]], found[[0, 1, 3, 5]])


def test_a_language_model_in_fp16_errs_as_pytorch_in_fp16_does(
    language_model: tuple[BoundModel, TracedModel], tmp_path: Path
) -> None:
    """Logits of every token that counts, each row under its own task, padded on the left too."""
    bound, traced = language_model
    path = written(half(routed_graph(traced, bound), "fp16"), bound, tmp_path)
    generator = np.random.default_rng(2)
    mask = np.ones((3, 9), np.int64)
    mask[1, 6:] = 0
    inputs = {
        "input_ids": generator.integers(0, language.VOCABULARY, (3, 9)),
        "attention_mask": mask,
        "task_ids": np.array([2, 0, 1]),
    }
    exact = oracle(bound, "fp64", inputs)
    floor = noise_floor(exact, oracle(bound, "fp16", inputs), "fp16")
    with OrtRunner(path, threads=1) as runner:
        found = runner.infer(inputs)["logits"]
    assert np.abs(found - exact)[mask == 1].max() <= FLOOR_FACTOR * floor


def test_a_merged_graph_is_converted_too(
    bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """One task's own graph in fp16, half the size of the one in fp32."""
    task = toys.TASKS[1]
    inputs = toys.token_rows(4, 7)
    routed = {**inputs, "task_ids": np.full(4, task.index)}
    exact = oracle(bound, "fp64", routed)[:, : len(task.labels)]
    lower = oracle(bound, "fp16", routed)[:, : len(task.labels)]
    path = written(half(merged_graph(traced, bound, task), "fp16"), bound, tmp_path)
    with OrtRunner(path, threads=1) as runner:
        found = runner.infer(inputs)["logits"]
        assert runner.metadata[DTYPE_KEY] == "fp16"
    assert np.abs(found - exact).max() <= FLOOR_FACTOR * noise_floor(exact, lower, "fp16")


def test_bf16_is_not_run_where_the_runtime_has_no_kernels(
    bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """The file passes onnx's check; ONNX Runtime's CPU provider says what it lacks."""
    path = written(half(routed_graph(traced, bound), "bf16"), bound, tmp_path)
    with pytest.raises(BackendMissingError, match="cannot compute in its types"):
        OrtRunner(path, threads=1).__enter__()


@BOTH
def test_weights_states_and_results_have_the_types_that_are_promised(
    bound: BoundModel, traced: TracedModel, dtype: str
) -> None:
    """Weights are of the type, ids stay int64, logits float32; opset and fp32 graph stay."""
    before = routed_graph(traced, bound)
    model = half(routed_graph(traced, bound), dtype)
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert HALF[dtype] in kinds
    assert ir.DataType.FLOAT not in kinds
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.INT64] * 4
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    assert model.graph.outputs[0].name == "logits"
    assert model.opset_imports == before.opset_imports
    again = routed_graph(traced, bound)
    assert {v.dtype for v in again.graph.initializers.values()} == {
        v.dtype for v in before.graph.initializers.values()
    }


@BOTH
def test_statistics_and_positions_stay_float32(dtype: str) -> None:
    """Squares of 300 and position 4099, which neither type holds, come out right."""
    model = half(ir.from_proto(onnx.parser.parse_model(ISLANDS)), dtype)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = np.array([[300.0, -320.0, 310.0], [0.5, 0.25, -0.75]], np.float32)
    positions = np.array([4099, 3])
    outputs = ReferenceEvaluator(proto).run(None, {"x": x, "positions": positions})
    found = np.asarray(next(iter(outputs)))
    root = np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True))
    expected = x / root * np.cos(positions)[:, None] * [1.5, 2.5, 3.5]
    np.testing.assert_allclose(found, expected, rtol=2e-2 if dtype == "bf16" else 2e-3)
    assert found.dtype == np.float32


def test_an_island_is_entered_and_left_once() -> None:
    """X goes in, the root and the cosine come out; between them nothing is cast."""
    model = half(ir.from_proto(onnx.parser.parse_model(ISLANDS)), "fp16")
    wide = {"Pow", "ReduceMean", "Sqrt", "Cos"}
    for node in model.graph:
        if node.op_type in wide:
            assert node.outputs[0].dtype == ir.DataType.FLOAT
    shifted = next(node for node in model.graph if node.outputs[0].name == "shifted")
    assert shifted.outputs[0].dtype == ir.DataType.FLOAT


@BOTH
def test_finite_numbers_stay_finite(dtype: str) -> None:
    """A mask's -3.4e38 becomes the type's lowest; NaN and infinities stay what they are."""
    given = np.array([-3.4028235e38, 1e5, 0.5, -np.inf, np.inf, np.nan], np.float32)
    found = narrowed(given, HALF[dtype]).astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(given))
    assert found[0] == (-65504 if dtype == "fp16" else float.fromhex("-0x1.fep127"))
    assert (found[3], found[4]) == (-np.inf, np.inf)
    assert np.isnan(found[5])


@BOTH
def test_poison_survives_in_the_reference_evaluator(dtype: str) -> None:
    """The toy's three layers and heads: bad ids NaN, known ones near the oracle."""
    from mtl_export.graph.passes.joint_gemm import JointGemmPass
    from mtl_export.graph.passes.route_tasks import RouteTasksPass
    from mtl_export.graph.passes.shared_cores import SharedCoresPass
    from mtl_export.graph.passes.shared_down import SharedDownPass

    model = marked.model()
    for step in (RouteTasksPass(marked.bound()), SharedDownPass(), SharedCoresPass()):
        model = step(model).model
    model = half(JointGemmPass()(model).model, dtype)
    x = np.random.default_rng(3).normal(size=(4, 3, 5)).astype(np.float32)
    ids = np.array([0, 5, 2, 1])
    found = marked.evaluate(model, x=x, task_ids=ids)
    expected = marked.logits(x, np.where(ids == 5, 0, ids))
    good = [0, 2, 3]
    assert np.isnan(found[1]).all()
    finite = np.isfinite(expected[good])
    scale = np.abs(expected[good][finite]).max()
    error = np.abs(found[good][finite] - expected[good][finite]).max()
    assert error <= scale * (0.1 if dtype == "bf16" else 0.01)
    np.testing.assert_array_equal(np.isneginf(found[good]), ~finite)


def test_a_subgraph_is_refused() -> None:
    """What is not converted is not passed off as converted."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    toy (bool c, float[n] x) => (float[n] y)
    {
        y = If (c) <then_branch = a () => (float[n] p) { p = Abs (x) },
                    else_branch = b () => (float[n] q) { q = Neg (x) }>
    }
    """
    with pytest.raises(GraphError, match="subgraph"):
        half(ir.from_proto(onnx.parser.parse_model(text)), "fp16")
