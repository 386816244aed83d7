"""Tasks added to, cut out of and renamed in a graph: the others keep every bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.bundle.edited import edit_folder
from mtl_export.bundle.manifest import Recipe, damage, read_manifest
from mtl_export.bundle.output import output_folder
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import (
    AdapterError,
)
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.passes.precision import PrecisionPass
from mtl_export.graph.passes.routing import TaskInput
from mtl_export.graph.task_edit import add_task, remove_task, rename_task, task_table
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graphs
from mtl_export.runtime.golden import GOLDEN_FILE, read_golden
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.adapters import toys
from tests.checkpoint import peft_toys
from tests.graph.task_edits import (
    ATOL,
    WIDE,
    add,
    assert_whole,
    bound_of,
    four_tasks,
    rows,
    run,
)


def test_an_added_task_answers_as_its_oracle_and_the_others_as_before(
    served: Path, four: BoundModel
) -> None:
    """Widest head, unknown ids, both parts; the untouched rows keep every bit."""
    before = run(served, rows([0, 1, 2, 2, 1, 0]))
    edited = add(served, four.adapters)
    assert [task.name for task in edited.after] == [*(t.name for t in toys.TASKS), WIDE.name]
    assert edited.unverified == (WIDE.name,)
    for file in ("model.onnx", "other.onnx"):
        onnx.checker.check_model(str(served / file), full_check=True)
        after = run(served, rows([0, 1, 2, 2, 1, 0]), file)
        np.testing.assert_array_equal(after[:, :4], before)
        assert np.isneginf(after[:, 4:]).all()
        mixed = rows([3, 0, 3, 2, 4, -1])
        found = run(served, mixed, file)
        assert found.shape == (6, 6)
        assert np.isnan(found[4:]).all()
        with OracleRunner(four, "fp64") as oracle:
            known = {name: value[:4] for name, value in mixed.items()}
            expected = oracle.infer(known)["logits"]
        np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=ATOL)
    assert_whole(served)


def test_an_edited_graph_is_what_an_export_of_the_new_checkpoint_would_be(
    served: Path, traced: TracedModel, four: BoundModel, tmp_path: Path
) -> None:
    """All tasks being those of one checkpoint, it is the graph's; the weights are the same."""
    add(served, four.adapters)
    (tmp_path / "fresh").mkdir()
    write_graphs({"model": routed_graph(traced, four)}, four, tmp_path / "fresh", None)
    edited, fresh = ir.load(served / "model.onnx"), ir.load(tmp_path / "fresh" / "model.onnx")
    assert dict(edited.metadata_props) == dict(fresh.metadata_props)
    for name, value in fresh.graph.initializers.items():
        stored = edited.graph.initializers[name].const_value
        assert stored is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(stored.numpy(), value.const_value.numpy())
    inputs = rows([3, 0, 1, 2, 3])
    np.testing.assert_array_equal(run(served, inputs), run(tmp_path / "fresh", inputs))
    manifest = read_manifest(served)
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


def test_a_removed_task_leaves_the_others_their_bits(served: Path) -> None:
    """Later ids move down by one; the width stays; the last id is unknown then."""
    before = run(served, rows([0, 2, 2, 0]))
    edited = edit_folder(
        served, lambda models: remove_task(models, "topics"), "remove topics", removed="topics"
    )
    assert [(task.name, task.index) for task in edited.after] == [
        ("sentiment", 0), ("relevance", 1),
    ]  # fmt: skip
    for file in ("model.onnx", "other.onnx"):
        np.testing.assert_array_equal(run(served, rows([0, 1, 1, 0]), file), before)
        assert np.isnan(run(served, rows([2, 3, -1, 2]), file)).all()
    vectors = read_golden(served / GOLDEN_FILE)
    assert [vector.name for vector in vectors] == ["sentiment", "relevance", "mixed", "unknown"]
    assert vectors[2].inputs["task_ids"].tolist() == [1, 0, 1]
    assert vectors[3].inputs["task_ids"].tolist() == [1, 2]
    assert_whole(served)


def test_a_renamed_task_keeps_its_id_and_its_evidence(served: Path) -> None:
    """No weight changes; table, manifest and golden vectors have the new name."""
    before = (served / "model.onnx.data").read_bytes()
    edited = edit_folder(
        served, lambda models: rename_task(models, "topics", "themes"), "rename",
        renamed=("topics", "themes"),
    )  # fmt: skip
    assert [task.name for task in edited.after] == ["sentiment", "themes", "relevance"]
    assert (served / "model.onnx.data").read_bytes() == before
    assert [v.name for v in read_golden(served / GOLDEN_FILE)][1] == "themes"
    for file in ("model.onnx", "other.onnx"):
        metadata = ir.load(served / file).metadata_props
        assert [one["name"] for one in json.loads(metadata["mtl_export.tasks"])][1] == "themes"
        assert json.loads(metadata["mtl_export.edits"]) == ["rename topics themes"]
    assert_whole(served)


def test_edits_add_up_and_are_written_down(served: Path, four: BoundModel) -> None:
    """Add, rename and remove in a row; the manifest says what no comparison has seen."""
    first = ir.load(served / "model.onnx").metadata_props["mtl_export.checkpoint_sha256"]
    add(served, four.adapters, "extra")
    edit_folder(
        served, lambda models: rename_task(models, "extra", "intent"), "rename extra intent",
        renamed=("extra", "intent"),
    )  # fmt: skip
    edited = edit_folder(
        served, lambda models: remove_task(models, "sentiment"), "remove", removed="sentiment"
    )
    assert edited.unverified == ("intent",)
    manifest = read_manifest(served)
    assert manifest is not None
    assert not damage(served, manifest)
    assert manifest.recipe.options["edits"] == ["add", "rename extra intent", "remove"]
    assert manifest.recipe.options["served"] == ["topics", "relevance", "intent"]
    metadata = ir.load(served / "model.onnx").metadata_props
    assert metadata["mtl_export.checkpoint_sha256"] != first
    assert manifest.recipe.sources["checkpoint_sha256"] == metadata["mtl_export.checkpoint_sha256"]
    inputs = rows([2, 1, 0, 2])
    found = run(served, inputs)
    with OracleRunner(four, "fp64") as oracle:
        expected = oracle.infer({**inputs, "task_ids": inputs["task_ids"] + 1})["logits"]
    np.testing.assert_allclose(found[[0, 3]], expected[[0, 3]], atol=ATOL)
    np.testing.assert_allclose(found[1, :1], expected[1, :1], atol=ATOL)


def test_the_same_edit_gives_the_same_bytes(
    served: Path, four: BoundModel, bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """Removing what was added gives back the stacks as they were, but for the width."""
    weights = (served / "model.onnx.data").read_bytes()
    narrow = bound_of(tmp_path / "narrow", four_tasks(wide=False), bound.base.folder)
    add(served, narrow.adapters)
    added = (served / "model.onnx.data").read_bytes()
    assert added != weights
    edit_folder(served, lambda models: remove_task(models, WIDE.name), "remove", removed=WIDE.name)
    assert (served / "model.onnx.data").read_bytes() == weights
    add(served, narrow.adapters)
    assert (served / "model.onnx.data").read_bytes() == added


def test_no_torch_is_needed(served: Path, four: BoundModel) -> None:
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
        [sys.executable, "-c", program, str(served), str(four.checkpoint.path)],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout.endswith("done\n")
    assert read_adapters(open_checkpoint(four.checkpoint.path)).tasks == tuple(
        task_table({"model": ir.load(served / "model.onnx")})
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
