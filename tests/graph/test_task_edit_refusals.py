"""Edits of a graph's tasks that are refused: nothing is written then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.bundle import edited
from mtl_export.bundle.edited import edit_folder
from mtl_export.bundle.manifest import add_to_manifest
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import (
    AdapterError,
    GraphError,
    IntegrityError,
    OutputError,
    TaskNotFoundError,
    UsageError,
)
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.task_edit import add_task, remove_task, rename_task, task_table
from mtl_export.graph.trace import TracedModel
from mtl_export.runtime.golden import GOLDEN_FILE, golden_bytes, read_golden
from tests.adapters import toys
from tests.graph.task_edits import (
    add,
    assert_whole,
    bound_of,
    four_tasks,
    rows,
    run,
)

NAMES = ("topics", "x")


def changed(name: str) -> dict[str, Any]:
    """Return the four tasks with one thing that they do not share with the graph."""
    parts = four_tasks()
    module = next(iter(toys.MODULES))
    layers = dict(parts["layers"])
    if name == "layer":
        layers["bert.encoder.layer.0.output.dense"] = layers["bert.encoder.layer.1.output.dense"]
    elif name == "missing":
        del layers[module]
    else:
        values = layers[module][name].copy()
        values.flat[0] += np.float32(1e-6)
        layers[module] = layers[module] | {name: values}
    return parts | {"layers": layers}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("down", "another down-projection of bert.encoder.layer.0.attention.self.query"),
        ("up", "another up-projection of bert.encoder.layer.0.attention.self.query"),
        ("layer", "layer bert.encoder.layer.0.output.dense, which no task of the graph adapts"),
        ("missing", "no adapter of bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_a_task_that_does_not_share_the_projections_is_refused(
    served: Path, bound: BoundModel, tmp_path: Path, change: str, found: str
) -> None:
    """One number's millionth is enough; nothing is written."""
    other = bound_of(tmp_path / "other", changed(change), bound.base.folder)
    before = {path.name: path.read_bytes() for path in served.iterdir()}
    with pytest.raises(AdapterError) as caught:
        add(served, other.adapters)
    assert found in caught.value.problem
    assert {path.name: path.read_bytes() for path in served.iterdir()} == before


POOLER = "bert.pooler.dense.bias"
NORM = "bert.encoder.layer.1.output.LayerNorm.weight"


def trained(adapters: AdapterSet, *, seed: int = 0, **parts: Any) -> AdapterSet:
    """Return the checkpoint with a norm and a bias that its training changed for all tasks."""
    generator = np.random.default_rng(seed)
    values = {name: generator.normal(size=12).astype(np.float32) for name in (POOLER, NORM)}
    return dataclasses.replace(adapters, replaced=MappingProxyType(values), **parts)


def test_tensors_that_all_tasks_of_the_graph_trained_must_be_the_new_checkpoints_too(
    bound: BoundModel, traced: TracedModel, four: BoundModel
) -> None:
    """The base's own or other values are refused; of an older graph it cannot be told."""

    def graph() -> dict[str, ir.Model]:
        source = dataclasses.replace(bound, adapters=trained(bound.adapters))
        return {"model": routed_graph(traced, source)}

    models, plain = graph(), four.adapters
    with pytest.raises(AdapterError) as caught:
        add_task(models, plain, plain.tasks[3], "intent")
    assert f"{POOLER} of the base, which the graph's tasks trained" in caught.value.problem
    other = trained(plain, seed=1)
    with pytest.raises(AdapterError, match=f"{NORM} with other values"):
        add_task(models, other, other.tasks[3], "intent")
    assert len(task_table(models)) == 3
    same = trained(plain)
    assert add_task(models, same, same.tasks[3], "intent")[3].name == "intent"
    older = graph()
    del older["model"].metadata_props["mtl_export.replaced"]
    assert add_task(older, plain, plain.tasks[3], "intent")


def test_what_the_new_task_has_and_the_graph_shares_is_refused(
    bound: BoundModel, traced: TracedModel, four: BoundModel
) -> None:
    """Gains, a bias and a norm's weight of its own."""
    module = next(iter(toys.MODULES))
    layer = four.adapters.layers[module]
    own = np.full((4, 12), 1.5)
    models = {"model": routed_graph(traced, bound)}
    for parts, found in (
        ({"layers": {**four.adapters.layers, module: dataclasses.replace(layer, gain=own)}},
         f"gains of {module}, which no task of the graph has"),
        ({"layers": {**four.adapters.layers, module: dataclasses.replace(layer, bias=own)}},
         f"its own bias of {module}, which the graph's tasks share"),
        ({"task_replaced": {NORM: (None, None, None, own[0])}},
         f"its own {NORM}, which the graph's tasks share"),
    ):  # fmt: skip
        adapters = dataclasses.replace(four.adapters, **parts)
        with pytest.raises(AdapterError) as caught:
            add_task(models, adapters, adapters.tasks[3], "intent")
        assert found in caught.value.problem


def test_what_cannot_be_edited_is_refused(
    served: Path, four: BoundModel, merged_folders: list[Path], tmp_path: Path
) -> None:
    """Unknown and taken names, another base, the only task, other graphs, damaged folders."""
    models = {"model": ir.load(served / "model.onnx")}
    adapters = four.adapters
    with pytest.raises(TaskNotFoundError):
        remove_task(models, "topic")
    with pytest.raises(UsageError, match="task of that name"):
        rename_task(models, "topics", "sentiment")
    with pytest.raises(UsageError, match="no task name"):
        rename_task(models, "topics", "a/b")
    with pytest.raises(UsageError, match="task of that name"):
        add_task(models, adapters, adapters.tasks[3], "topics")
    with pytest.raises(IntegrityError, match="trained on another model"):
        add_task(models, adapters, adapters.tasks[3], "intent", "0" * 64)
    assert [task.name for task in task_table(models)] == [task.name for task in toys.TASKS]
    for name in ("sentiment", "topics"):
        remove_task(models, name)
    with pytest.raises(UsageError, match="only task"):
        remove_task(models, "relevance")
    merged = {"model": ir.load(merged_folders[0] / "model.onnx")}
    with pytest.raises(GraphError, match="no input that picks a task"):
        task_table(merged)
    with pytest.raises(UsageError, match="no such folder"):
        edit_folder(tmp_path / "nowhere", task_table, "")
    (served / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        edit_folder(served, task_table, "")


@pytest.mark.parametrize("moment", ["read", "written"])
def test_a_second_edit_during_the_first_is_refused(
    served: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Begun after the graphs were read, or before the swap: nothing of it, all of the first."""
    refused = []

    def second() -> None:
        with pytest.raises(OutputError, match="another run is writing inside it") as caught:
            edit_folder(served, lambda found: rename_task(found, "topics", "x"), "", renamed=NAMES)
        refused.append(caught.value)

    def first(models: dict[str, ir.Model]) -> tuple[Task, ...]:
        after = remove_task(models, "relevance")
        if moment == "read":
            second()
        return after

    if moment == "written":
        monkeypatch.setattr(edited, "_check", lambda folder, stems: second())
    before = run(served, rows([0, 1, 1, 0]))
    edit_folder(served, first, "remove", removed="relevance")
    assert len(refused) == 1
    np.testing.assert_array_equal(run(served, rows([0, 1, 1, 0])), before)
    assert_whole(served)
    assert [path.name for path in served.parent.iterdir()] == [served.name]
    after = edit_folder(served, lambda found: rename_task(found, *NAMES), "", renamed=NAMES)
    assert [task.name for task in after.after] == ["sentiment", "x"]


def test_a_stack_of_strangers_is_refused(served: Path) -> None:
    """A tensor that is gathered by task id and is none of ours would be left as it is."""
    model = ir.load(served / "model.onnx")
    node = next(n for n in model.graph if n.op_type == "TaskHeadRows")
    value = node.inputs[2]
    assert value is not None
    value.name = "classifier.quantized"
    with pytest.raises(GraphError, match=r"classifier\.quantized"):
        remove_task({"model": model}, "topics")


@pytest.mark.parametrize("ids", [np.array([0.0, 1.0]), np.array([[0, 1], [1, 0]]), np.array(0)])
def test_golden_vectors_without_ids_by_row_are_refused(served: Path, ids: Any) -> None:
    """They cannot follow the tasks; the folder stays as it was."""
    files = {name: (served / name).read_bytes() for name in ("model.onnx", GOLDEN_FILE)}
    first = read_golden(served / GOLDEN_FILE)[0]
    vectors = [dataclasses.replace(first, inputs={**first.inputs, "task_ids": ids})]
    (served / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
    files[GOLDEN_FILE] = (served / GOLDEN_FILE).read_bytes()
    add_to_manifest(served, GOLDEN_FILE)
    with pytest.raises(IntegrityError, match="task_ids of 'sentiment' are"):
        edit_folder(
            served, lambda models: rename_task(models, "topics", "x"), "", renamed=("topics", "x")
        )
    assert {name: (served / name).read_bytes() for name in files} == files
