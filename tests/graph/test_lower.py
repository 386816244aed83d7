from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import SINGLE_FILE, open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import lower
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.passes.markers import markers
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from mtl_export.graph.trace import SAMPLE_BATCH, SAMPLE_SEQUENCE, TracedModel, trace
from mtl_export.graph.writer import write_graph
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import OracleRunner
from mtl_export.version import VERSION
from tests.adapters import toys
from tests.factories import toy_base
from tests.graph import marked

# Batches and lengths, none of them traced; the logits are of order 1.
SHAPES = [(1, 1), (1, 7), (2, 33), (5, 9), (7, 40)]
ATOL = 3e-5


def run(folder: Path, inputs: Mapping[str, Array]) -> Array:
    """Return the logits of the graph in ``folder``."""
    with OrtRunner(folder / "model.onnx", threads=1) as runner:
        return runner.infer(inputs)["logits"]


def oracle(bound: BoundModel, inputs: Mapping[str, Array]) -> Array:
    """Return the unmerged model's logits in float64."""
    with OracleRunner(bound, "fp64") as runner:
        return runner.infer(inputs)["logits"]


def assert_same(found: Array, expected: Array) -> None:
    """Compare finite logits, and where there are none."""
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], atol=ATOL)


def test_the_shapes_were_not_traced() -> None:
    """The comparison below would prove little on the traced sizes."""
    assert all(b != SAMPLE_BATCH and s != SAMPLE_SEQUENCE for b, s in SHAPES)


@pytest.mark.parametrize(("batch", "sequence"), SHAPES)
def test_the_routed_graph_answers_every_row_by_its_task(
    bound: BoundModel, routed_folder: Path, batch: int, sequence: int
) -> None:
    """Mixed tasks at untraced sizes equal the oracle; labels a task lacks are -inf."""
    for shift in range(3):
        inputs = toys.token_rows(batch, sequence, seed=shift)
        inputs["task_ids"] = (np.arange(batch) * 2 + shift) % 3
        found = run(routed_folder, inputs)
        assert_same(found, oracle(bound, inputs))
        for row, task in enumerate(inputs["task_ids"]):
            labels = len(toys.TASKS[task].labels)
            assert np.isfinite(found[row, :labels]).all()
            assert np.isneginf(found[row, labels:]).all()


@pytest.mark.parametrize("task", toys.TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize(("batch", "sequence"), SHAPES)
def test_a_merged_graph_answers_as_its_task(
    bound: BoundModel, merged_folders: list[Path], task: Task, batch: int, sequence: int
) -> None:
    """Each task's own graph equals the oracle at untraced sizes, as wide as its labels."""
    inputs = toys.token_rows(batch, sequence)
    expected = oracle(bound, {**inputs, "task_ids": np.full(batch, task.index)})
    assert_same(run(merged_folders[task.index], inputs), expected[:, : len(task.labels)])


def test_tasks_answer_differently(routed_folder: Path) -> None:
    """The same text under each task gives three different answers."""
    row = toys.token_rows(1, 9)
    inputs = {name: np.repeat(value, 3, axis=0) for name, value in row.items()}
    found = run(routed_folder, {**inputs, "task_ids": np.arange(3)})[:, 0]
    assert np.abs(np.subtract.outer(found, found)[~np.eye(3, dtype=bool)]).min() > 1e-2


def test_a_row_answers_the_same_in_any_company(routed_folder: Path) -> None:
    """Permuting a batch permutes its answers."""
    inputs = toys.token_rows(6, 13)
    inputs["task_ids"] = np.array([0, 1, 2, 2, 1, 0])
    order = np.array([3, 0, 5, 2, 4, 1])
    found = run(routed_folder, inputs)
    permuted = run(routed_folder, {name: value[order] for name, value in inputs.items()})
    finite = np.isfinite(found[order])
    np.testing.assert_allclose(permuted[finite], found[order][finite], atol=ATOL)


@pytest.mark.parametrize("bad", [3, 9, -1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_an_unknown_id_is_nan_in_its_rows_only(routed_folder: Path, bad: int) -> None:
    """Bad rows are NaN in every column; good rows beside them keep every bit."""
    inputs = toys.token_rows(5, 9)
    good = run(routed_folder, {**inputs, "task_ids": np.array([1, 0, 2, 1, 0])})
    found = run(routed_folder, {**inputs, "task_ids": np.array([1, bad, 2, bad, 0])})
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_array_equal(found[[0, 2, 4]], good[[0, 2, 4]])
    assert not np.isnan(found[[0, 2, 4]]).any()


def test_a_batch_of_unknown_ids_is_all_nan(routed_folder: Path) -> None:
    """One bad row alone is never answered by the base model."""
    assert np.isnan(run(routed_folder, {**toys.token_rows(1, 5), "task_ids": np.array([9])})).all()


def test_changing_one_task_leaves_the_others_bit_identical(
    bound: BoundModel, traced: TracedModel, routed_folder: Path, tmp_path: Path
) -> None:
    """New Lambda, mixing and head for task 1 change its rows and no bit of any other."""
    parts = toys.checkpoint_parts()
    for values in parts["layers"].values():
        values["lambda"][1] *= -1.5
        values["mixing"][1] += [0.7, -0.2]
    weight, bias = parts["heads"][toys.HEAD]["topics"]
    parts["heads"][toys.HEAD]["topics"] = (weight * 2, bias - 1)
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    changed = toys.bound_model(bound.base.folder, adapter)
    (tmp_path / "out").mkdir()
    write_graph(routed_graph(traced, changed), changed, tmp_path / "out", None)
    inputs = {**toys.token_rows(6, 9), "task_ids": np.array([0, 1, 2, 1, 0, 2])}
    before, after = run(routed_folder, inputs), run(tmp_path / "out", inputs)
    others = inputs["task_ids"] != 1
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before[~others] - after[~others]).min() > 1e-3


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "learnt scale"])
def test_a_diagonal_lambda_is_lowered_from_the_same_trace(
    bound: BoundModel, traced: TracedModel, scaler: bool, tmp_path: Path
) -> None:
    """The trace knows the base only: another adapter's graphs come from it too."""
    parts = toys.checkpoint_parts(diagonal=True, scaler=scaler)
    adapter = toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference())
    other = toys.bound_model(bound.base.folder, adapter)
    inputs = {**toys.token_rows(5, 9), "task_ids": np.array([2, 1, 0, 1, 2])}
    expected = oracle(other, inputs)
    (tmp_path / "routed").mkdir()
    write_graph(routed_graph(traced, other), other, tmp_path / "routed", None)
    assert_same(run(tmp_path / "routed", inputs), expected)
    task = toys.TASKS[1]
    (tmp_path / "merged").mkdir()
    write_graph(merged_graph(traced, other, task), other, tmp_path / "merged", task)
    rows = inputs.pop("task_ids") == 1
    found = run(tmp_path / "merged", inputs)
    np.testing.assert_allclose(found[rows], expected[rows], atol=ATOL)


def test_a_bfloat16_base_is_exported_in_float32(tmp_path: Path) -> None:
    """A base stored in bfloat16 gives the same graphs as its widened values."""
    base = toy_base(tmp_path / "base")
    tensors = load_file(base / SINGLE_FILE)
    halves = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    save_file(halves, base / SINGLE_FILE, {"format": "pt"})
    bound = toys.toy_bound(tmp_path)
    assert {t.dtype for t in open_base(str(base)).tensors.values()} == {"BF16"}
    traced = trace(bound)
    inputs = {**toys.token_rows(5, 9), "task_ids": np.array([2, 1, 0, 1, 2])}
    expected = oracle(bound, inputs)
    (tmp_path / "routed").mkdir()
    write_graph(routed_graph(traced, bound), bound, tmp_path / "routed", None)
    assert_same(run(tmp_path / "routed", inputs), expected)


def test_lowering_does_not_touch_the_trace(bound: BoundModel, traced: TracedModel) -> None:
    """After any number of lowerings the trace has its markers and no new input."""
    before = ir.to_proto(traced.model).SerializeToString(deterministic=True)
    routed_graph(traced, bound)
    merged_graph(traced, bound, toys.TASKS[0])
    assert ir.to_proto(traced.model).SerializeToString(deterministic=True) == before
    assert len(markers(traced.model)) == len(toys.MODULES) + 1


def test_lowered_graphs_hold_what_they_need_and_no_more(
    bound: BoundModel, traced: TracedModel
) -> None:
    """No marker, no traced weight of an adapted layer, and in a merged graph nothing of ours."""
    routed = routed_graph(traced, bound)
    merged = merged_graph(traced, bound, toys.TASKS[0])
    for model in (routed, merged):
        assert markers(model) == []
        assert not {f"{module}.weight" for module in toys.MODULES} & set(model.graph.initializers)
    assert {node.domain for node in merged.graph.all_nodes()} == {""}
    assert not merged.functions
    assert "mtl_export" not in merged.opset_imports
    assert sorted(key[1] for key in routed.functions) == [
        "TaskDeltaRows",
        "TaskHeadRows",
        "TaskJoin",
        "TaskJoinBias",
    ]


def test_a_marker_that_no_pass_took_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of marker that every pass leaves to another never reaches a file."""

    class Idle(ir.passes.InPlacePass):
        def __init__(self, bound: BoundModel, task_input: str) -> None:
            super().__init__()

        def call(self, model: ir.Model) -> ir.passes.PassResult:
            return ir.passes.PassResult(model, modified=False)

    monkeypatch.setattr(lower, "RouteNormsPass", Idle)
    text = marked.GRAPH.replace("r = Relu (h)", 'r = mtl_export.TaskNorm <module = "enc.norm"> (h)')
    traced = TracedModel(marked.model(text), tuple(marked.SIZES), (marked.HEAD,))
    with pytest.raises(ir.passes.PostconditionError, match=r"enc\.norm"):
        routed_graph(traced, marked.bound())


def test_the_file_says_what_it_is(bound: BoundModel, traced: TracedModel) -> None:
    """Metadata keys, layout, tasks and hashes are those documented."""
    routed = routed_graph(traced, bound)
    merged = merged_graph(traced, bound, toys.TASKS[1])
    for model, layout, tasks in (
        (routed, "single-graph", toys.TASKS),
        (merged, "per-task", toys.TASKS[1:2]),
    ):
        metadata = model.metadata_props
        assert set(metadata) == {
            f"mtl_export.{key}"
            for key in (
                "version", "layout", "family", "tasks", "base_sha256", "checkpoint_sha256", "sizes",
            )
        } | (
            {"mtl_export.task_input", "mtl_export.replaced"} if model is routed else set()
        )  # fmt: skip
        assert metadata["mtl_export.version"] == VERSION
        assert metadata["mtl_export.layout"] == layout == model.graph.name
        assert metadata["mtl_export.family"] == "mtl_lora"
        assert metadata["mtl_export.base_sha256"] == bound.base.sha256
        assert metadata["mtl_export.checkpoint_sha256"] == bound.checkpoint.sha256
        assert json.loads(metadata["mtl_export.tasks"]) == [
            {"name": t.name, "index": t.index, "labels": list(t.labels), "kind": t.kind}
            for t in tasks
        ]
        assert json.loads(metadata["mtl_export.sizes"])["layers"] == len(toys.MODULES)
        assert (model.producer_name, model.producer_version) == ("mtl-export", VERSION)


def test_base_products_stay_stock_and_biases_last(bound: BoundModel, traced: TracedModel) -> None:
    """Joint GEMMs taken apart, every adapted layer is MatMul of the base, delta, then the bias."""
    model = SplitGemmPass()(routed_graph(traced, bound)).model
    last = {
        value.name: node
        for node in model.graph.all_nodes()
        for value in node.inputs
        if value is not None and value.name in {f"{module}.bias" for module in toys.MODULES}
    }
    assert len(last) == len(toys.MODULES)
    for name, node in last.items():
        module = (name or "").removesuffix(".bias")
        assert node.op_type == "Add"
        assert node.inputs[1] is not None
        assert node.inputs[1].name == name
        assert node.inputs[0] is not None
        adapted = node.inputs[0].producer()
        assert adapted is not None
        assert adapted.op_type == "Add"
        producers = [value.producer() for value in adapted.inputs if value is not None]
        kinds = [(p.domain, p.op_type) for p in producers if p is not None]
        assert kinds[0] == ("", "MatMul")
        assert kinds[1][0] == "mtl_export"
        matmul = producers[0]
        assert matmul is not None
        assert matmul.inputs[1] is not None
        assert matmul.inputs[1].name == f"{module}.weight_t"
