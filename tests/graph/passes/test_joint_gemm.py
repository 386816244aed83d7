from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mtl_export.graph.passes.composed_up import ComposedUpPass
from mtl_export.graph.passes.joint_gemm import JointGemmPass
from mtl_export.graph.passes.shared_cores import SharedCoresPass
from mtl_export.graph.passes.shared_down import SharedDownPass
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from tests.graph import layers
from tests.graph.marked import counts

DOWN = (SharedDownPass,)
CORES = (*DOWN, SharedCoresPass)
JOINT = (*CORES, JointGemmPass)
SPLIT = (*JOINT, SplitGemmPass)
ALL = pytest.mark.parametrize(
    "steps", [DOWN, CORES, JOINT, SPLIT], ids=["shared down", "shared cores", "joint", "split"]
)


def rewritten(steps: tuple[type[ir.passes.InPlacePass], ...], text: str = layers.GRAPH) -> ir.Model:
    """Return the two layers after these passes."""
    model = layers.model(text)
    for step in steps:
        model = step()(model).model
    return model


def run(model: ir.Model, task_ids: list[int], sequence: int = 4) -> list[np.ndarray]:
    """Return q and w by onnx's own evaluator, after a full check."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(8).normal(size=(len(task_ids), sequence, layers.IN))
    inputs = {"x": x.astype(np.float32), "task_ids": np.array(task_ids)}
    return [np.asarray(value) for value in ReferenceEvaluator(proto).run(None, inputs)]


@ALL
@pytest.mark.parametrize(("ids", "sequence"), [([0, 1, 2, 1], 4), ([2], 1), ([1, 0], 7)])
def test_numbers_stay(
    steps: tuple[type[ir.passes.InPlacePass], ...], ids: list[int], sequence: int
) -> None:
    """After every pass the layers answer as the formula does, mixed tasks in any shape."""
    x = np.random.default_rng(8).normal(size=(len(ids), sequence, layers.IN))
    expected = layers.oracle(x.astype(np.float32), np.array(ids))
    for found, wanted in zip(run(rewritten(steps), ids, sequence), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@ALL
def test_the_slice_of_nan_still_poisons_whole_rows(
    steps: tuple[type[ir.passes.InPlacePass], ...],
) -> None:
    """Slice T, where routing sends bad ids, is NaN in every element; rows beside it are not."""
    for found, good in zip(
        run(rewritten(steps), [0, layers.TASKS, 2]), run(rewritten(steps), [0, 1, 2]), strict=True
    ):
        assert np.isnan(found[1]).all()
        np.testing.assert_array_equal(found[[0, 2]], good[[0, 2]])


def test_one_down_projection_serves_layers_that_read_the_same_x() -> None:
    """Two deltas become one GEMM with both downs, a Split, and a TaskUp each."""
    found = counts(rewritten(DOWN))
    assert found[("mtl_export", "TaskUp")] == 2
    assert found[("", "MatMul")] == 3
    assert (found[("", "Split")], found[("", "Concat")], found[("", "Gather")]) == (1, 1, 2)
    assert ("mtl_export", "TaskDelta") not in found


def test_layers_that_read_different_x_share_nothing() -> None:
    """A delta of its own input gets a GEMM of its own, without Split."""
    text = layers.GRAPH.replace("TaskDelta (x, task_ids, wide", "TaskDelta (r, task_ids, wide")
    text = text.replace("wide_product = MatMul (x", "r = Relu (x)\n    wide_product = MatMul (r")
    found = counts(rewritten(DOWN, text))
    assert ("", "Split") not in found
    assert found[("", "MatMul")] == 4


def test_all_cores_are_gathered_at_once() -> None:
    """One Gather is left, of the cores side by side."""
    found = counts(rewritten(CORES))
    assert (found[("", "Gather")], found[("", "Split")], found[("", "Concat")]) == (1, 2, 2)


def test_cores_of_one_layer_alone_stay_as_they_are() -> None:
    """There is nothing to share."""
    text = layers.GRAPH.split("wide_product")[0].replace("\n     float", "") + "}"
    text = text.replace(",\n    (float", ",").replace(", float[batch, sequence, 7] w", "")
    model = rewritten(DOWN, text)
    assert not SharedCoresPass()(model).modified


def test_base_and_low_rank_part_become_one_gemm() -> None:
    """No Add of a delta is left; the bias goes in before a Reshape and stays last elsewhere."""
    model = rewritten(JOINT)
    found = counts(model)
    assert found[("mtl_export", "TaskJoinBias")] == found[("mtl_export", "TaskJoin")] == 1
    assert (found[("", "Add")], found[("", "MatMul")]) == (1, 3)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert add.inputs[1] is not None
    assert add.inputs[1].name == "wide_bias"
    assert sorted(key[1] for key in model.functions) == ["TaskJoin", "TaskJoinBias"]


def test_the_file_keeps_the_base_weight_by_itself() -> None:
    """Weights are joined when a runtime loads them; initializers are what they were."""
    assert set(rewritten(JOINT).graph.initializers) == set(layers.values())


def test_a_layer_back_from_the_wide_middle_keeps_its_two_gemms() -> None:
    """With I >= 2 O, copying x would cost more than adding the delta."""
    text = layers.GRAPH.replace("sequence, 7] w", "sequence, 2] w")
    model = layers.model(text, {**layers.SIZES, "wide": (2, 3)})
    for step in JOINT:
        model = step()(model).model
    found = counts(model)
    assert found[("mtl_export", "TaskUp")] == 1
    assert ("mtl_export", "TaskJoin") not in found


WIDE_UP = {**layers.SIZES, "query": (6, 4 * layers.DOWN), "wide": (7, 65)}


@pytest.mark.parametrize("ids", [[0, 1, 2, 1], [2]])
def test_a_wide_up_projection_is_composed_with_each_rows_core(ids: list[int]) -> None:
    """U > 64 keeps two GEMMs, U >= 4 D multiplies the core into up first; numbers stay."""
    before, model = layers.model(sizes=WIDE_UP), layers.model(sizes=WIDE_UP)
    for step in (*JOINT, ComposedUpPass):
        model = step()(model).model
    found = counts(model)
    assert found[("mtl_export", "TaskComposedUp")] == 1
    assert found[("mtl_export", "TaskJoinBias")] == 1
    assert ("mtl_export", "TaskUp") not in found
    for value, wanted in zip(run(model, ids), run(before, ids), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    poisoned = run(model, [layers.TASKS, 0])
    assert all(np.isnan(value[0]).all() and np.isfinite(value[1]).all() for value in poisoned)


def test_one_token_a_row_composes_nothing() -> None:
    """A decoding step would spend more on composing than it saves."""
    text = layers.GRAPH.replace("sequence", "1")
    model = layers.model(text, WIDE_UP)
    for step in JOINT:
        model = step()(model).model
    assert counts(model)[("mtl_export", "TaskUp")] == 1
    assert not ComposedUpPass()(model).modified


def test_split_gives_back_what_quantisers_look_for() -> None:
    """Every base weight is again the second input of a MatMul, the biases come last."""
    model = rewritten(SPLIT)
    weights = {
        node.inputs[1].name
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None
    }
    assert {"query_weight_t", "wide_weight_t"} <= weights
    found = counts(model)
    assert (found[("mtl_export", "TaskUp")], found[("", "Add")]) == (2, 4)
    assert sorted(key[1] for key in model.functions) == ["TaskUp"]


def test_a_second_run_finds_nothing() -> None:
    """Passes say what they changed."""
    model = rewritten(JOINT)
    assert not SharedDownPass()(model).modified
    assert not SharedCoresPass()(model).modified
    assert not JointGemmPass()(model).modified
    assert SplitGemmPass()(model).modified
    assert not SplitGemmPass()(model).modified
