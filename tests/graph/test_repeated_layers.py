"""A layer that runs several times: DeBERTa-v3 projects positions by its queries' layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import GraphError
from mtl_export.graph.lower import adapter_input_graph, merged_graph, routed_graph
from mtl_export.graph.taps import layer_taps
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph
from mtl_export.parity.diagnosis.activations import captured
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.one_task import OneTaskRunner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.graph import kinds

# The targets that PEFT gives this model by default, with the model's own setting.
KIND = kinds.Kind(
    "deberta-v3", "DebertaV2ForSequenceClassification", kinds.DEBERTA, "query_proj|value_proj",
    ["classifier"],
)  # fmt: skip
QUERY = "deberta.encoder.layer.0.attention.self.query_proj"
ATOL = 1e-5


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the adapter on its base."""
    return kinds.toy_bound(KIND, tmp_path_factory.mktemp("deberta"))


@pytest.fixture(scope="module")
def traced(bound: BoundModel) -> TracedModel:
    """Return its trace."""
    return trace(bound)


def written(model: ir.Model, bound: BoundModel, folder: Path) -> Path:
    """Return the file of a graph, whose names are all different."""
    write_graph(model, bound, folder, None)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    return folder / "model.onnx"


def test_a_graph_of_mixed_tasks_says_why_not(bound: BoundModel, traced: TracedModel) -> None:
    """Positions are projected once for all rows; layer, use and the ways out are named."""
    with pytest.raises(GraphError, match=rf"{QUERY}: use 2 of 2: .*\[1,16,12\]") as caught:
        routed_graph(traced, bound)
    assert "one result for all rows" in caught.value.expected
    for way in ("--layout per-task", "--task-input scalar", "mtl-export merge"):
        assert way in caught.value.fix


@pytest.mark.parametrize("task", kinds.TASKS, ids=lambda task: task.name)
def test_one_task_is_answered_as_by_the_oracle(
    bound: BoundModel, traced: TracedModel, tmp_path: Path, task: Task
) -> None:
    """Alone in its graph, and in one whose batches are of one task."""
    inputs = kinds.Kind.rows(KIND, 4, 9) | {"task_ids": np.full(4, task.index)}
    with OracleRunner(bound, "fp64") as oracle:
        wanted = oracle.infer(inputs)["logits"]
    for name in ("merged", "scalar"):
        (tmp_path / name).mkdir()
    scalar = routed_graph(traced, bound, task_input="scalar")
    path = written(scalar, bound, tmp_path / "scalar")
    with OneTaskRunner(OrtRunner(path)) as runner:
        found = runner.infer(inputs)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL)
    path = written(merged_graph(traced, bound, task), bound, tmp_path / "merged")
    with OrtRunner(path) as runner:
        merged = runner.infer({n: v for n, v in inputs.items() if n != "task_ids"})["logits"]
    np.testing.assert_allclose(merged, wanted[:, : len(task.labels)], rtol=0, atol=ATOL)


def test_a_tensor_is_one_input_for_all_uses(bound: BoundModel, traced: TracedModel) -> None:
    """Callers feed it once."""
    model, parameters = adapter_input_graph(traced, bound)
    names = [value.name for value in model.graph.inputs]
    assert len(set(names)) == len(names)
    assert [one.name for one in parameters if one.name.startswith(f"{QUERY}.")] == [f"{QUERY}.core"]


def test_no_error_is_pinned_on_a_layer_that_runs_twice(
    bound: BoundModel, traced: TracedModel
) -> None:
    """It would not be known in which use; in PyTorch its activations are left out too."""
    model = routed_graph(traced, bound, task_input="scalar")
    modules = bound.adapters.layers
    seen = {tap.module for tap in layer_taps(model, modules)}
    assert seen == {module for module in modules if module.endswith("value_proj")}
    layers = {"once": nn.Linear(2, 2), "twice": nn.Linear(2, 2)}
    with captured(layers) as found:
        layers["twice"](layers["once"](layers["twice"](torch.ones(1, 2))))
    assert list(found) == ["once"]
