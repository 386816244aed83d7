"""Tasks added to, cut out of and renamed in a graph: the others keep every bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.bundle.edited import Edited, edit_folder
from mtl_export.bundle.manifest import Recipe, damage, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.bundle.verify import verify_folder
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    AdapterError,
    GraphError,
    IntegrityError,
    TaskNotFoundError,
    UsageError,
)
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.passes.precision import PrecisionPass
from mtl_export.graph.passes.routing import TaskInput
from mtl_export.graph.task_edit import add_task, remove_task, rename_task, task_table
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graphs
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, golden_bytes, read_golden
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.pytorch import OracleRunner
from tests.adapters import toys
from tests.checkpoint import peft_toys
from tests.factories import HIDDEN

WIDE = Task("intent", 3, ("a", "b", "c", "d", "e", "f"), "single_label_classification")
ATOL = 3e-5


def four_tasks(*, wide: bool = True) -> dict[str, Any]:
    """Return the toy checkpoint's parts with a fourth task; the first three are unchanged."""
    parts = toys.checkpoint_parts()
    generator = np.random.default_rng(9)
    labels = WIDE.labels if wide else WIDE.labels[:3]
    task = Task(WIDE.name, 3, labels, WIDE.kind)
    layers = {}
    for module, tensors in parts["layers"].items():
        own = {
            name: np.concatenate([tensors[name], tensors[name][:1] + generator.normal(size=1)])
            for name in ("lambda", "mixing")
        }
        layers[module] = tensors | {name: v.astype(np.float32) for name, v in own.items()}
    head = (
        generator.normal(size=(len(labels), HIDDEN)).astype(np.float32),
        generator.normal(size=len(labels)).astype(np.float32),
    )
    heads = {toys.HEAD: {**parts["heads"][toys.HEAD], task.name: head}}
    return parts | {"tasks": (*toys.TASKS, task), "layers": layers, "heads": heads}


def bound_of(folder: Path, parts: dict[str, Any], base: Path) -> BoundModel:
    """Return a checkpoint of these parts, bound to the toy base."""
    return toys.bound_model(base, toys.write_checkpoint(folder, parts, BaseReference()))


@pytest.fixture(scope="module")
def four(bound: BoundModel, tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the checkpoint with the fourth task."""
    return bound_of(tmp_path_factory.mktemp("four") / "adapter", four_tasks(), bound.base.folder)


@pytest.fixture
def folder(bound: BoundModel, traced: TracedModel, tmp_path: Path) -> Path:
    """Return a fresh folder of the single graph, as two parts, with golden vectors."""
    sources = {"base_sha256": "", "checkpoint_sha256": ""}
    recipe = Recipe("onnx", {"layout": "single-graph"}, sources, "1")
    with output_folder(tmp_path / "onnx", recipe=recipe) as plan:
        models = {stem: routed_graph(traced, bound) for stem in ("model", "other")}
        write_graphs(models, bound, plan.folder, None)
        vectors = [golden(plan.folder, task.name, [task.index] * 2) for task in toys.TASKS]
        vectors += [golden(plan.folder, "mixed", [2, 0, 1, 2]),
                    golden(plan.folder, "unknown", [2, 3])]  # fmt: skip
        (plan.folder / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
    return tmp_path / "onnx"


def golden(folder: Path, name: str, ids: list[int]) -> Vector:
    """Return what the graph answers now."""
    inputs = {**toys.token_rows(len(ids), 6), "task_ids": np.array(ids)}
    return Vector(name, "model.onnx", inputs, {"logits": run(folder, inputs)}, 0.0, 0.0)


def run(folder: Path, inputs: dict[str, Array], file: str = "model.onnx") -> Array:
    """Return the logits."""
    with OrtRunner(folder / file, threads=1) as runner:
        logits: Array = runner.infer(inputs)["logits"]
    return logits


def rows(ids: Sequence[int]) -> dict[str, Array]:
    """Return inputs of these tasks; the text of row i is the same whatever the ids are."""
    return {**toys.token_rows(len(ids), 9), "task_ids": np.array(ids)}


def add(folder: Path, adapters: AdapterSet, name: str = WIDE.name) -> Edited:
    """Add the fourth task."""
    return edit_folder(
        folder, lambda models: add_task(models, adapters, adapters.tasks[3], name), "add",
        added=name,
    )  # fmt: skip


def assert_whole(folder: Path) -> None:
    """Fail unless files and golden vectors are as the manifest says."""
    checks = verify_folder(folder, threads=1)
    assert {check.verdict for check in checks} == {"passed"}, checks


def test_an_added_task_answers_as_its_oracle_and_the_others_as_before(
    folder: Path, four: BoundModel
) -> None:
    """Widest head, unknown ids, both parts; the untouched rows keep every bit."""
    before = run(folder, rows([0, 1, 2, 2, 1, 0]))
    edited = add(folder, four.adapters)
    assert [task.name for task in edited.after] == [*(t.name for t in toys.TASKS), WIDE.name]
    assert edited.unverified == (WIDE.name,)
    for file in ("model.onnx", "other.onnx"):
        onnx.checker.check_model(str(folder / file), full_check=True)
        after = run(folder, rows([0, 1, 2, 2, 1, 0]), file)
        np.testing.assert_array_equal(after[:, :4], before)
        assert np.isneginf(after[:, 4:]).all()
        mixed = rows([3, 0, 3, 2, 4, -1])
        found = run(folder, mixed, file)
        assert found.shape == (6, 6)
        assert np.isnan(found[4:]).all()
        with OracleRunner(four, "fp64") as oracle:
            known = {name: value[:4] for name, value in mixed.items()}
            expected = oracle.infer(known)["logits"]
        np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=ATOL)
    assert_whole(folder)


def test_an_edited_graph_is_what_an_export_of_the_new_checkpoint_would_be(
    folder: Path, traced: TracedModel, four: BoundModel, tmp_path: Path
) -> None:
    """All tasks being those of one checkpoint, it is the graph's; the weights are the same."""
    add(folder, four.adapters)
    (tmp_path / "fresh").mkdir()
    write_graphs({"model": routed_graph(traced, four)}, four, tmp_path / "fresh", None)
    edited, fresh = ir.load(folder / "model.onnx"), ir.load(tmp_path / "fresh" / "model.onnx")
    assert dict(edited.metadata_props) == dict(fresh.metadata_props)
    for name, value in fresh.graph.initializers.items():
        stored = edited.graph.initializers[name].const_value
        assert stored is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(stored.numpy(), value.const_value.numpy())
    inputs = rows([3, 0, 1, 2, 3])
    np.testing.assert_array_equal(run(folder, inputs), run(tmp_path / "fresh", inputs))
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.recipe.sources["checkpoint_sha256"] == four.adapters.checkpoint_sha256


@pytest.mark.parametrize(
    ("task_input", "dtype"), [("scalar", ""), ("rows", "fp16"), ("rows", "bf16")]
)
def test_other_forms_of_the_graph_are_edited_alike(
    bound: BoundModel, traced: TracedModel, four: BoundModel, task_input: TaskInput, dtype: str
) -> None:
    """One task for the batch, half precision: the edited weights are those of a new export."""

    def lowered(source: BoundModel) -> ir.Model:
        model = routed_graph(traced, source, task_input=task_input)
        return PrecisionPass(dtype)(model).model if dtype else model

    edited, fresh = lowered(bound), lowered(four)
    before = {
        name: value.const_value.numpy()
        for name, value in edited.graph.initializers.items()
        if value.const_value is not None
    }
    add_task({"model": edited}, four.adapters, four.adapters.tasks[3], WIDE.name)
    for name, value in fresh.graph.initializers.items():
        stored = edited.graph.initializers[name].const_value
        assert stored is not None
        assert value.const_value is not None
        assert stored.dtype == value.const_value.dtype
        assert stored.tobytes() == value.const_value.tobytes()
    if not dtype:
        assert edited.graph.outputs[0].shape == ir.Shape(["batch", 6])
    remove_task({"model": edited}, WIDE.name)
    for name, weight in before.items():
        now = edited.graph.initializers[name].const_value
        assert now is not None
        kept = now.numpy()[..., : weight.shape[-1]] if weight.ndim else now.numpy()
        assert kept.tobytes() == weight.tobytes()


def test_a_removed_task_leaves_the_others_their_bits(folder: Path) -> None:
    """Later ids move down by one; the width stays; the last id is unknown then."""
    before = run(folder, rows([0, 2, 2, 0]))
    edited = edit_folder(
        folder, lambda models: remove_task(models, "topics"), "remove topics", removed="topics"
    )
    assert [(task.name, task.index) for task in edited.after] == [
        ("sentiment", 0), ("relevance", 1),
    ]  # fmt: skip
    for file in ("model.onnx", "other.onnx"):
        np.testing.assert_array_equal(run(folder, rows([0, 1, 1, 0]), file), before)
        assert np.isnan(run(folder, rows([2, 3, -1, 2]), file)).all()
    vectors = read_golden(folder / GOLDEN_FILE)
    assert [vector.name for vector in vectors] == ["sentiment", "relevance", "mixed", "unknown"]
    assert vectors[2].inputs["task_ids"].tolist() == [1, 0, 1]
    assert vectors[3].inputs["task_ids"].tolist() == [1, 2]
    assert_whole(folder)


def test_a_renamed_task_keeps_its_id_and_its_evidence(folder: Path) -> None:
    """No weight changes; table, manifest and golden vectors have the new name."""
    before = (folder / "model.onnx.data").read_bytes()
    edited = edit_folder(
        folder, lambda models: rename_task(models, "topics", "themes"), "rename",
        renamed=("topics", "themes"),
    )  # fmt: skip
    assert [task.name for task in edited.after] == ["sentiment", "themes", "relevance"]
    assert (folder / "model.onnx.data").read_bytes() == before
    assert [v.name for v in read_golden(folder / GOLDEN_FILE)][1] == "themes"
    for file in ("model.onnx", "other.onnx"):
        metadata = ir.load(folder / file).metadata_props
        assert [one["name"] for one in json.loads(metadata["mtl_export.tasks"])][1] == "themes"
        assert json.loads(metadata["mtl_export.edits"]) == ["rename topics themes"]
    assert_whole(folder)


def test_edits_add_up_and_are_written_down(folder: Path, four: BoundModel) -> None:
    """Add, rename and remove in a row; the manifest says what no comparison has seen."""
    first = ir.load(folder / "model.onnx").metadata_props["mtl_export.checkpoint_sha256"]
    add(folder, four.adapters, "extra")
    edit_folder(
        folder, lambda models: rename_task(models, "extra", "intent"), "rename extra intent",
        renamed=("extra", "intent"),
    )  # fmt: skip
    edited = edit_folder(
        folder, lambda models: remove_task(models, "sentiment"), "remove", removed="sentiment"
    )
    assert edited.unverified == ("intent",)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert not damage(folder, manifest)
    assert manifest.recipe.options["edits"] == ["add", "rename extra intent", "remove"]
    assert manifest.recipe.options["served"] == ["topics", "relevance", "intent"]
    metadata = ir.load(folder / "model.onnx").metadata_props
    assert metadata["mtl_export.checkpoint_sha256"] != first
    assert manifest.recipe.sources["checkpoint_sha256"] == metadata["mtl_export.checkpoint_sha256"]
    inputs = rows([2, 1, 0, 2])
    found = run(folder, inputs)
    with OracleRunner(four, "fp64") as oracle:
        expected = oracle.infer({**inputs, "task_ids": inputs["task_ids"] + 1})["logits"]
    np.testing.assert_allclose(found[[0, 3]], expected[[0, 3]], atol=ATOL)
    np.testing.assert_allclose(found[1, :1], expected[1, :1], atol=ATOL)


def test_the_same_edit_gives_the_same_bytes(
    folder: Path, four: BoundModel, bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """Removing what was added gives back the stacks as they were, but for the width."""
    weights = (folder / "model.onnx.data").read_bytes()
    narrow = bound_of(tmp_path / "narrow", four_tasks(wide=False), bound.base.folder)
    add(folder, narrow.adapters)
    added = (folder / "model.onnx.data").read_bytes()
    assert added != weights
    edit_folder(folder, lambda models: remove_task(models, WIDE.name), "remove", removed=WIDE.name)
    assert (folder / "model.onnx.data").read_bytes() == weights
    add(folder, narrow.adapters)
    assert (folder / "model.onnx.data").read_bytes() == added


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
    folder: Path, bound: BoundModel, tmp_path: Path, change: str, found: str
) -> None:
    """One number's millionth is enough; nothing is written."""
    other = bound_of(tmp_path / "other", changed(change), bound.base.folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterError) as caught:
        add(folder, other.adapters)
    assert found in caught.value.found
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_cannot_be_edited_is_refused(
    folder: Path, four: BoundModel, merged_folders: list[Path], tmp_path: Path
) -> None:
    """Unknown and taken names, another base, the only task, other graphs, damaged folders."""
    models = {"model": ir.load(folder / "model.onnx")}
    adapters = four.adapters
    with pytest.raises(TaskNotFoundError):
        remove_task(models, "topic")
    with pytest.raises(UsageError, match="has a task of that name"):
        rename_task(models, "topics", "sentiment")
    with pytest.raises(UsageError, match="no task name"):
        rename_task(models, "topics", "a/b")
    with pytest.raises(UsageError, match="has a task of that name"):
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
    (folder / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        edit_folder(folder, task_table, "")


def test_a_stack_of_strangers_is_refused(folder: Path) -> None:
    """A tensor that is gathered by task id and is none of ours would be left as it is."""
    model = ir.load(folder / "model.onnx")
    node = next(n for n in model.graph if n.op_type == "TaskHeadRows")
    value = node.inputs[2]
    assert value is not None
    value.name = "classifier.quantized"
    with pytest.raises(GraphError, match=r"classifier\.quantized"):
        remove_task({"model": model}, "topics")


def test_no_torch_is_needed(folder: Path, four: BoundModel) -> None:
    """Reading a checkpoint, adding its task and writing the folder imports no torch."""
    program = (
        "import sys\n"
        "from mtl_export_cli.main import cli\n"
        "words = ['tasks', 'add', sys.argv[1], 'intent', '--checkpoint', sys.argv[2], '-q']\n"
        "sys.argv[1:] = words\n"
        "try:\n    cli()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "    assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)\n"
        "    print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(four.checkpoint.path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.endswith("done\n")
    assert read_adapters(open_checkpoint(four.checkpoint.path)).tasks == tuple(
        task_table({"model": ir.load(folder / "model.onnx")})
    )


def lora_tasks(folder: Path, base: Path, seeds: Sequence[int], *, rank: int = 2) -> BoundModel:
    """Return one PEFT adapter per seed on two layers."""
    for seed in seeds:
        tensors = peft_toys.lora(peft_toys.QUERY, seed=seed, rank=rank)
        tensors |= peft_toys.lora(peft_toys.NARROW, seed=seed, rank=rank)
        head = peft_toys.head(2 + seed, seed=seed)
        peft_toys.write(folder / f"task{seed}", {**tensors, **head}, {"r": rank})
    checkpoint = open_checkpoint(folder, task_names=[f"task{seed}" for seed in seeds])
    opened = open_base(str(base))
    return bind(checkpoint, read_adapters(checkpoint, opened), opened)


def test_tasks_that_bring_their_own_factors_are_added_too(
    bound: BoundModel, tmp_path: Path
) -> None:
    """PEFT: one LoRA per task; a higher rank than any is another graph."""
    base = bound.base.folder
    two = lora_tasks(tmp_path / "two", base, [0, 1])
    three = lora_tasks(tmp_path / "three", base, [0, 1, 2])
    graph = routed_graph(trace(two), two)
    with output_folder(tmp_path / "onnx", recipe=Recipe("onnx", {}, {}, "1")) as plan:
        write_graphs({"model": graph}, two, plan.folder, None)
    inputs = rows([0, 1, 1, 0])
    before = run(tmp_path / "onnx", inputs)
    adapters = read_adapters(open_checkpoint(tmp_path / "three" / "task2"))
    steep = lora_tasks(tmp_path / "steep", base, [2], rank=3).adapters
    models = {"model": ir.load(tmp_path / "onnx" / "model.onnx")}
    with pytest.raises(AdapterError, match="rank 3"):
        add_task(models, steep, steep.tasks[0], "task2")
    edit_folder(
        tmp_path / "onnx", lambda found: add_task(found, adapters, adapters.tasks[0], "task2"),
        "add", added="task2",
    )  # fmt: skip
    np.testing.assert_array_equal(run(tmp_path / "onnx", inputs)[:, :3], before)
    inputs = rows([2, 0, 2, 1])
    with OracleRunner(three, "fp64") as oracle:
        expected = oracle.infer(inputs)["logits"]
    found = run(tmp_path / "onnx", inputs)
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=ATOL)
