"""``TaskSession`` on graphs whose task is chosen for the whole batch: batches are split by task."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from mtl_export.errors import EngineRunError
from mtl_export.runtime import TaskSession
from mtl_export.runtime.onnx_adapters import active, adapter_file, write_adapter
from mtl_export.runtime.ort import OrtPart, open_session

TASKS = [
    {"name": name, "index": index, "labels": ["low", "high"], "kind": "regression"}
    for index, name in enumerate(("one", "two", "three"))
]
# Sums a row's tokens that are not padding, times two factors of the task.
BODY = """
{
    counted = Mul (input_ids, attention_mask)
    axis = Constant <value = int64[1] {1}> ()
    sum = ReduceSum <keepdims = 1> (counted, axis)
    wide = Cast <to = 1> (sum)
    logits = Mul (wide, factors)
}
"""
TOKENS = "int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask"
HEAD = '<ir_version: 10, opset_import: ["" : 20]> toy'
FACTORS = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
ROWS = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
ORDER = [2, 0, 1, 0, 2]
EXPECTED = [sum(row) * FACTORS[task] for row, task in zip(ROWS, ORDER, strict=True)]


def written(text: str, layout: str, path: Path) -> Path:
    """Write the graph ``text`` with our metadata."""
    model = onnx.parser.parse_model(text)
    metadata = {"mtl_export.tasks": json.dumps(TASKS), "mtl_export.layout": layout}
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path.parent


def with_input(folder: Path, shape: str) -> Path:
    """Write a graph that takes one task as ``task_ids``."""
    task = f"int64{shape} task_ids" if shape else "int64 task_ids"
    gather = """
{
    table = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()
    factors = Gather (table, task_ids)"""
    body = BODY.replace("\n{", gather, 1)
    text = f"{HEAD} ({TOKENS}, {task}) => (float[batch, 2] logits) {body}"
    return written(text, "single-graph", folder / "model.onnx")


def with_adapters(folder: Path) -> Path:
    """Write a graph that takes one task as adapter, and the adapters."""
    text = (
        f"{HEAD} ({TOKENS}, float[1, 2] factors) => (float[batch, 2] logits)"
        f" <float[1, 2] factors = {{0, 0}}> {BODY}"
    )
    for task, factors in zip(TASKS, FACTORS, strict=True):
        write_adapter(folder / adapter_file("model", str(task["name"])), {"factors": factors[None]})
    return written(text, "adapter-input", folder / "model.onnx")


@pytest.fixture(params=["[1]", "", "adapters"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder of each of the three ways to choose a task for a batch."""
    if request.param == "adapters":
        return with_adapters(tmp_path)
    return with_input(tmp_path, request.param)


@pytest.mark.parametrize("size", [None, 1])
def test_mixed_tasks_are_run_one_after_the_other(folder: Path, size: int | None) -> None:
    """Rows come back in their order, each under its own task, whatever ran together."""
    session = TaskSession(folder, threads=1)
    for _ in range(3):
        results = session.run({"input_ids": ROWS}, ORDER, max_batch=size)
        np.testing.assert_array_equal(results.outputs["logits"], np.array(EXPECTED))
        for answer, expected, task in zip(results.answers, EXPECTED, ORDER, strict=True):
            assert answer.task.name == TASKS[task]["name"]
            np.testing.assert_array_equal(np.asarray(answer.logits), expected)
    other = session.run({"input_ids": ROWS}, "two").outputs["logits"]
    np.testing.assert_array_equal(other, np.array([sum(row) * FACTORS[1] for row in ROWS]))


def test_an_adapter_that_is_gone_is_refused(tmp_path: Path) -> None:
    """Not served by the base instead."""
    folder = with_adapters(tmp_path)
    (folder / adapter_file("model", "two")).unlink()
    with pytest.raises(EngineRunError, match="two"):
        TaskSession(folder)


@pytest.mark.parametrize("kind", ["adapters", "[1]"])
def test_parts_of_language_models_choose_their_task_too(tmp_path: Path, kind: str) -> None:
    """A part takes every row's task, or an adapter; what is called present stays as it is."""
    folder = with_adapters(tmp_path) if kind == "adapters" else with_input(tmp_path, kind)
    model = onnx.load(folder / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("Identity", ["sum"], ["present.0.key"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("present.0.key", 7, ["batch", 1]))
    onnx.save(model, folder / "model.onnx")
    adapter = active(folder / adapter_file("model", "two")) if kind == "adapters" else None
    part = OrtPart(open_session(folder / "model.onnx"), folder / "model.onnx", adapter)
    is_adapted = adapter is not None
    del adapter  # the part keeps it
    ids = np.array([[1, 2], [3, 4]])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs |= {} if is_adapted else {"task_ids": np.array([1, 1])}
    outputs = part(inputs)
    np.testing.assert_array_equal(outputs["logits"], np.array([3 * FACTORS[1], 7 * FACTORS[1]]))
    np.testing.assert_array_equal(outputs["present.0.key"].numpy(), [[3], [7]])
    again = part({**inputs, "input_ids": ids[:, ::-1]})
    np.testing.assert_array_equal(again["logits"], outputs["logits"])


def test_a_pipe_is_no_adapter(tmp_path: Path) -> None:
    """Nobody writes to it, and the library would wait."""
    os.mkfifo(tmp_path / "spam.onnx_adapter")
    with pytest.raises(EngineRunError, match="no such file"):
        active(tmp_path / "spam.onnx_adapter")
