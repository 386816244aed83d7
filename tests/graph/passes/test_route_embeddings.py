"""Embeddings that differ between tasks: the pass on graphs written as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet, Factors, LayerAdapter, OwnAdapter, Rows
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.passes.merge_task import MergeTaskPass
from mtl_export.graph.passes.route_embeddings import RouteEmbeddingsPass
from tests.adapters.toys import memory_tensor
from tests.graph import marked

TASKS = tuple(Task(name, index) for index, name in enumerate("abc"))
ENTRIES, FEATURES = 11, 4
GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (int64[batch, sequence] ids) => (float[batch, sequence, 4] y)
{
    y = mtl_export.TaskEmbedding <module = "emb"> (ids)
}
"""
POSITIONS = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1]>
toy (int64[1, sequence] ids, float[batch, sequence, 4] x) => (float[batch, sequence, 4] y)
<float[1, sequence, 4] p, float[1, sequence, 4] q>
{
    p = mtl_export.TaskEmbedding <module = "emb"> (ids)
    q = Relu (p)
    y = Add (x, q)
}
"""
NEAR_MISS = """
<ir_version: 10, opset_import: ["" : 20, "mtl_export" : 1, "vendor" : 1]>
toy (int64[batch, sequence] ids) => (float[batch, sequence, 4] y)
{
    z = vendor.TaskEmbedding <module = "emb"> (ids)
    y = Identity (z)
}
"""
WEIGHT = np.random.default_rng(0).normal(size=(ENTRIES, FEATURES)).astype(np.float32)
IDS = np.array([[0, 10, 3], [3, 3, 1], [10, 0, 5], [1, 2, 3]])


def bound(**parts: Any) -> BoundModel:
    """Return three tasks on one embedding, in memory."""
    adapters = AdapterSet(
        family="lora", tasks=TASKS, heads={}, model_class="Toy", checkpoint_sha256="",
        **{"layers": {}, **parts},
    )  # fmt: skip
    checkpoint = Checkpoint(
        path=Path("memory"), format="memory", family="lora", tasks=TASKS, layers={}, heads={},
        base=BaseReference(), model_class="Toy", sha256="",
    )  # fmt: skip
    tensors = {"emb.weight": memory_tensor("emb.weight", WEIGHT)}
    base = BaseModel("memory", Path("memory"), MappingProxyType({}), tensors, ())
    return BoundModel(checkpoint, adapters, base, "")


def own_factors(*, gain: bool = False) -> BoundModel:
    """Return tasks of rank 2 and 3, and one that leaves the embedding alone."""
    generator = np.random.default_rng(1)
    blocks = tuple(
        Factors(
            down=generator.normal(size=(rank, ENTRIES)),
            core=generator.normal(size=(rank, rank)),
            up=generator.normal(size=(FEATURES, rank)),
        )
        if rank
        else None
        for rank in (2, 0, 3)
    )
    gains = generator.normal(size=(3, FEATURES)) if gain else None
    layer = OwnAdapter("emb", ENTRIES, FEATURES, blocks, gain=gains, transposed=True)
    return bound(layers={"emb": layer})


def shared_factors() -> BoundModel:
    """Return tasks that share factors and differ by their core."""
    generator = np.random.default_rng(2)
    layer = LayerAdapter(
        "emb",
        down=generator.normal(size=(2, ENTRIES)),
        core=generator.normal(size=(3, 2, 2)),
        up=generator.normal(size=(FEATURES, 2)),
        transposed=True,
    )
    return bound(layers={"emb": layer})


def own_rows() -> BoundModel:
    """Return a task with new rows, one with an embedding of its own, one with the base's."""
    generator = np.random.default_rng(3)
    rows = Rows(np.array([10, 3]), generator.normal(size=(2, FEATURES)))
    whole = generator.normal(size=(ENTRIES, FEATURES))
    return bound(
        rows={"emb.weight": (rows, None, None)}, task_replaced={"emb.weight": (None, whole, None)}
    )


CASES = {
    "own": own_factors(),
    "gain": own_factors(gain=True),
    "shared": shared_factors(),
    "rows": own_rows(),
}


def table(case: BoundModel, task: int) -> Array:
    """Return one task's embedding, in float64."""
    adapters = case.adapters
    layer = adapters.layers.get("emb")
    weight = WEIGHT.astype(np.float64)
    if layer is not None:
        weight = weight + layer.delta(task).T
        return weight if layer.gain is None else weight * layer.gain[task]
    rows = adapters.own_rows("emb.weight", task)
    whole = adapters.replacement("emb.weight", task)
    return whole if whole is not None else weight if rows is None else rows.placed_in(weight)


def routed(case: BoundModel, text: str = GRAPH) -> ir.Model:
    """Return the graph lowered for all tasks."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    return RouteEmbeddingsPass(case)(model).model


@pytest.mark.parametrize("name", CASES)
def test_every_row_looks_up_its_own_task(name: str) -> None:
    """A mixed batch equals each task's own table; an unknown id is NaN in its row only."""
    case = CASES[name]
    model = routed(case)
    task_ids = np.array([2, 0, 1, 0])
    found = marked.evaluate(model, ids=IDS, task_ids=task_ids)
    for row, task in enumerate(task_ids):
        np.testing.assert_allclose(found[row], table(case, task)[IDS[row]], rtol=1e-5, atol=1e-5)
    spoilt = marked.evaluate(model, ids=IDS, task_ids=np.array([2, 3, 1, -1]))
    assert np.isnan(spoilt[[1, 3]]).all()
    np.testing.assert_array_equal(spoilt[[0, 2]], found[[0, 2]])


@pytest.mark.parametrize("name", CASES)
def test_positions_become_rows_of_the_batch(name: str) -> None:
    """Ids [1, S] serve all rows, and what is computed from them widens with them."""
    case = CASES[name]
    model = routed(case, POSITIONS)
    x = np.random.default_rng(4).normal(size=(4, 3, FEATURES)).astype(np.float32)
    task_ids = np.array([2, 0, 1, 0])
    found = marked.evaluate(model, ids=IDS[:1], x=x, task_ids=task_ids)
    for row, task in enumerate(task_ids):
        expected = x[row] + np.maximum(table(case, task)[IDS[0]], 0)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
    shapes = {str(value.shape[0]) for node in model.graph for value in node.outputs if value.shape}
    assert "1" not in shapes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("task", TASKS)
def test_merged_it_is_a_plain_look_up(name: str, task: Task) -> None:
    """One Gather from the task's own table."""
    model = MergeTaskPass(CASES[name], task)(ir.from_proto(onnx.parser.parse_model(GRAPH))).model
    assert marked.counts(model) == {("", "Gather"): 1}
    found = marked.evaluate(model, ids=IDS)
    expected = table(CASES[name], task.index)[IDS]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "custom"),
    [
        ("own", {"TaskEmbeddingDelta": 1}),
        ("gain", {"TaskEmbeddingDelta": 1, "TaskVectors": 1}),
        ("rows", {"TaskEmbeddingRows": 1}),
    ],
)
def test_exactly_the_ops_needed(name: str, custom: Mapping[str, int]) -> None:
    """Custom ops by their count, each with its body and no other."""
    model = routed(CASES[name])
    found = {op: n for (domain, op), n in marked.counts(model).items() if domain == "mtl_export"}
    assert found == custom
    assert sorted(key[1] for key in model.functions) == sorted(custom)


def test_untouched_rows_are_stored_once() -> None:
    """The table is the base's, then what tasks have of their own, then one row of NaN."""
    value = routed(CASES["rows"]).graph.initializers["emb.table"].const_value
    assert value is not None
    assert value.shape == ir.Shape([ENTRIES + 2 + ENTRIES + 1, FEATURES])
    np.testing.assert_array_equal(value.numpy()[:ENTRIES], WEIGHT)


@pytest.mark.parametrize("shape", ["int64[3, sequence]", "int64[n, sequence]", "int64[batch]"])
def test_ids_that_are_no_rows_are_refused(shape: str) -> None:
    """Rows that cannot be told apart."""
    text = GRAPH.replace("int64[batch, sequence]", shape)
    with pytest.raises(GraphError, match="its input has shape"):
        routed(CASES["own"], text)


def test_adapted_here_and_replaced_there_is_refused() -> None:
    """One graph has one base embedding; per task is the way out."""
    whole = np.ones((ENTRIES, FEATURES))
    case = bound(
        layers=own_factors().adapters.layers, task_replaced={"emb.weight": (None, whole, None)}
    )
    with pytest.raises(GraphError, match="another replaced it") as caught:
        routed(case)
    assert "--layout per-task" in caught.value.fix


def test_a_near_miss_keeps_its_nodes() -> None:
    """The same name in another domain stays."""
    model = routed(CASES["own"], NEAR_MISS)
    assert marked.counts(model)["vendor", "TaskEmbedding"] == 1
    assert not model.functions
