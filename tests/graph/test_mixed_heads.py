"""Tasks whose heads differ in what they compute: each kind is an output of the single graph."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task, task_named
from mtl_export.checkpoint.sentence_embedding import SentenceEmbedding
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.lower import adapter_input_graph, merged_graph, routed_graph
from mtl_export.graph.task_edit import add_task, remove_task
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graph
from mtl_export.merge.head_file import HEAD_FILE
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.onnx_adapters import adapter_file, write_adapter
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from mtl_export.runtime.session import TaskSession
from tests.adapters import toys
from tests.factories import HIDDEN
from tests.graph.mixed_heads import HEADS, NAMES, OUTPUTS

ATOL = 3e-5
TASK_IDS = np.array([4, 0, 2, 1, 3, 5, 2])
# By output: shape of a row, with a sequence of 6.
SHAPES = {
    "classification": (4,),
    "regression": (1,),
    "token_classification": (6, 5),
    "last_hidden_state": (6, HIDDEN),
    "classification_2": (2,),
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    """Return text inputs at a size nobody mixed_trace."""
    return toys.token_rows(len(TASK_IDS), 6)


@pytest.fixture(scope="module")
def expected(mixed_bound: BoundModel, inputs: dict[str, Array]) -> list[Array]:
    """Return each row's answer of the unmerged model in float64, the row alone in its batch."""
    rows = []
    with OracleRunner(mixed_bound, "fp64") as runner:
        for row, task in enumerate(TASK_IDS):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            outputs = runner.infer({**one, "task_ids": TASK_IDS[row : row + 1]})
            assert list(outputs) == [OUTPUTS[NAMES[task]]]
            rows.append(next(iter(outputs.values()))[0])
    return rows


def labels_of(task: Task) -> int:
    """Return how many columns of its output are the task's."""
    return len(task.labels) or HIDDEN


def assert_rows(outputs: dict[str, Array], expected: list[Array], tasks: tuple[Task, ...]) -> None:
    """Check every row of every output: the task's own answer, or -inf and nothing else."""
    assert {name: value.shape[1:] for name, value in outputs.items()} == SHAPES
    for row, index in enumerate(TASK_IDS):
        task = tasks[index]
        for name, value in outputs.items():
            labels = labels_of(task) if name == task.output else 0
            assert np.isneginf(value[row, ..., labels:]).all(), (name, task.name)
            if labels:
                own = expected[row][..., :labels]
                np.testing.assert_allclose(value[row, ..., :labels], own, atol=ATOL)


def test_the_reader_names_the_outputs(mixed_bound: BoundModel) -> None:
    """One output for each computation; widths do not matter, and labels are the tasks' own."""
    assert {task.name: task.output for task in mixed_bound.checkpoint.tasks} == OUTPUTS
    assert mixed_bound.adapters.model_class == "BertModel"
    labels = [len(task.labels) for task in mixed_bound.checkpoint.tasks]
    assert labels == [0 if head is None else head["num_labels"] for head in HEADS.values()]


def test_the_oracle_answers_a_mixed_batch(
    mixed_bound: BoundModel, inputs: dict[str, Array], expected: list[Array]
) -> None:
    """It has all outputs, and in each the rows of other tasks are -inf."""
    with OracleRunner(mixed_bound, "fp64") as runner:
        outputs = runner.infer({**inputs, "task_ids": TASK_IDS})
    assert_rows(outputs, expected, mixed_bound.adapters.tasks)


def test_single_graph(
    mixed_bound: BoundModel, mixed_folder: Path, inputs: dict[str, Array], expected: list[Array]
) -> None:
    """A mixed batch has every row's answer in its own output; unknown ids are NaN in all."""
    with OrtRunner(mixed_folder / "model.onnx", threads=1) as runner:
        assert_rows(
            runner.infer({**inputs, "task_ids": TASK_IDS}), expected, mixed_bound.adapters.tasks
        )
        ids = np.array([0, 6, -1, 2, 3, 4, 5])
        for name, value in runner.infer({**inputs, "task_ids": ids}).items():
            assert np.isnan(value[1:3]).all(), name
            assert not np.isnan(value[[0, 3, 4, 5, 6]]).any(), name


def test_the_table_says_which_output(mixed_folder: Path) -> None:
    """The file alone says where each task's answer is, and how wide."""
    model = ir.load(mixed_folder / "model.onnx")
    table = json.loads(model.metadata_props["mtl_export.tasks"])
    assert {entry["name"]: entry["output"] for entry in table} == OUTPUTS


def test_one_task_for_the_batch(
    mixed_bound: BoundModel,
    mixed_trace: TracedModel,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """With a scalar task the outputs of other kinds are -inf throughout."""
    write_graph(
        routed_graph(mixed_trace, mixed_bound, task_input="scalar"), mixed_bound, tmp_path, None
    )
    session = TaskSession(tmp_path, threads=1)
    results = session.run(inputs, TASK_IDS.tolist())
    assert_rows({**results.outputs}, expected, mixed_bound.adapters.tasks)


def test_session_gives_each_task_its_output(
    mixed_folder: Path, inputs: dict[str, Array], expected: list[Array]
) -> None:
    """An answer has the row's own output alone, cut to the task's labels."""
    session = TaskSession(mixed_folder, threads=1)
    results = session.run(inputs, [NAMES[index] for index in TASK_IDS])
    assert set(results.outputs) == set(SHAPES)
    for row, answer in enumerate(results.answers):
        assert list(answer.outputs) == [OUTPUTS[answer.task.name]]
        if answer.task.name == "states":
            assert answer.logits is None
            own = answer.outputs["last_hidden_state"]
        else:
            assert answer.logits is not None
            own = answer.logits
        wanted = expected[row][..., : labels_of(answer.task)]
        # Tokens end where the row's padding begins.
        assert own.ndim == wanted.ndim
        wanted = wanted[: len(own)] if own.ndim > 1 else wanted
        np.testing.assert_allclose(own, wanted, atol=ATOL)


def test_merged_graphs_and_folders(
    mixed_bound: BoundModel,
    mixed_trace: TracedModel,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """Alone a task answers with ``logits``, or with its states, as any merged model does."""
    for task in mixed_bound.adapters.tasks:
        row = TASK_IDS.tolist().index(task.index)
        folder, merged = tmp_path / f"{task.name}-onnx", tmp_path / f"{task.name}-merged"
        folder.mkdir()
        merged.mkdir()
        write_graph(merged_graph(mixed_trace, mixed_bound, task), mixed_bound, folder, task)
        write_merged(mixed_bound, task, merged, dtype=None)
        assert (merged / HEAD_FILE).is_file() == bool(task.labels)
        name = "logits" if task.labels else "last_hidden_state"
        own = expected[row][..., : labels_of(task)]
        with OrtRunner(folder / "model.onnx", threads=1) as runner:
            outputs = runner.infer(inputs)
            assert list(outputs) == [name]
            np.testing.assert_allclose(outputs[name][row], own, atol=ATOL)
        with MergedRunner(merged) as pytorch:
            np.testing.assert_allclose(pytorch.infer(inputs)[name][row], own, atol=ATOL)
        assert TaskSession(folder, threads=1).tasks == (dataclasses.replace(task, output=""),)


def test_adapter_input(
    mixed_bound: BoundModel,
    mixed_trace: TracedModel,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """An active adapter answers in its task's output alone; without one all outputs are NaN."""
    model, parameters = adapter_input_graph(mixed_trace, mixed_bound)
    write_graph(model, mixed_bound, tmp_path, None)
    for task in mixed_bound.adapters.tasks:
        values = {one.name: one.value(task.index).astype(np.float32) for one in parameters}
        write_adapter(tmp_path / adapter_file("model", task.name), values)
    results = TaskSession(tmp_path, threads=1).run(inputs, TASK_IDS.tolist())
    assert_rows({**results.outputs}, expected, mixed_bound.adapters.tasks)
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        assert all(np.isnan(value).all() for value in runner.infer(inputs).values())


def test_tasks_are_added_and_removed(
    mixed_bound: BoundModel,
    mixed_folder: Path,
    inputs: dict[str, Array],
    expected: list[Array],
    tmp_path: Path,
) -> None:
    """A task that goes takes its slices along; it comes back as the last, in its own output."""
    models = {"model": ir.load(mixed_folder / "model.onnx")}
    gone = task_named(mixed_bound.adapters.tasks, "states")
    after = remove_task(models, gone.name)
    assert [task.output for task in after] == [OUTPUTS[task.name] for task in after]
    after = add_task(models, mixed_bound.adapters, gone, gone.name)
    assert after[-1] == dataclasses.replace(gone, index=5)
    ir.save(models["model"], tmp_path / "model.onnx", external_data="model.onnx.data")
    ids = np.array([next(t.index for t in after if t.name == NAMES[i]) for i in TASK_IDS])
    with OrtRunner(tmp_path / "model.onnx", threads=1) as runner:
        outputs = runner.infer({**inputs, "task_ids": ids})
    assert_rows(outputs, expected, mixed_bound.adapters.tasks)


def test_pooling_is_refused(mixed_bound: BoundModel, mixed_trace: TracedModel) -> None:
    """States that only some tasks answer with are not pooled; alone in its graph a task's are."""
    embedding = SentenceEmbedding("mean")
    with pytest.raises(GraphError, match="--pooling"):
        routed_graph(mixed_trace, mixed_bound, embedding=embedding)
    task = task_named(mixed_bound.adapters.tasks, "states")
    merged = merged_graph(mixed_trace, mixed_bound, task, embedding=embedding)
    assert [value.name for value in merged.graph.outputs] == [
        "sentence_embedding",
        "last_hidden_state",
    ]
