from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.runtime import TaskSession
from tests.cli.conftest import Run
from tests.factories import TASKS, VOCABULARY

SINGLE = Path("out/onnx/model.onnx")
# What float32 may do to the toy's logits where a node became several.
NOISE = 1e-5


def answers(path: Path) -> Array:
    """Return the logits of rows of every task, and of two unknown ids."""
    ids = np.random.default_rng(0).integers(5, VOCABULARY, (len(TASKS) + 2, 7))
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "task_ids": np.array([*range(len(TASKS)), len(TASKS), -1]),
    }
    logits: Array = onnxruntime.InferenceSession(str(path)).run(None, feed)[0]
    return logits


def functions_of(path: Path) -> list[str]:
    """Return the names of the functions of a file, which has others' nodes only without any."""
    model = onnx.load(str(path), load_external_data=False)
    names = [function.name for function in model.functions]
    assert bool(names) == any(node.domain for node in model.graph.node)
    return names


def test_an_inlined_graph_answers_alike_and_everything_else_takes_it(
    exported: Path, run: Run
) -> None:
    """Stock nodes only; the same bits; parity, verify, sessions and task edits go on working."""
    expected = answers(SINGLE)
    assert functions_of(SINGLE)
    other = run("onnx", "--all-tasks", "--inline")
    assert other.code == 2  # another recipe: not up to date
    assert run("onnx", "--all-tasks", "--inline", "--force").code == 0
    assert not functions_of(SINGLE)
    assert [one.domain for one in onnx.load(str(SINGLE)).opset_import] == [""]
    np.testing.assert_array_equal(answers(SINGLE), expected)
    assert np.isnan(answers(SINGLE)[len(TASKS) :]).all()
    assert [task.name for task in TaskSession("out/onnx").tasks] == [task.name for task in TASKS]
    report = run("parity", "--quick", "--json")
    assert report.code == 0, report.stdout
    (stored,) = [cell for cell in report.json["cells"] if cell["case"] == "stored tensors"]
    assert stored["verdict"] == "passed"
    assert run("verify", "out/onnx").code == 0


def test_task_edits_of_an_inlined_graph_are_those_of_one_with_functions(
    exported: Path, run: Run
) -> None:
    """Removing and adding a task gives both graphs the same answers, by the same bits."""
    words = ("onnx", "--all-tasks", "--inline", "-o", "inlined")
    assert run(*words).code == 0
    for folder in ("out/onnx", "inlined"):
        assert run("tasks", "remove", folder, "ads_rel").code == 0
        added = run("tasks", "add", folder, "again", "-c", "adapter", "--from", "ads_rel")
        assert added.code == 0, added.stderr
    found, expected = answers(Path("inlined/model.onnx")), answers(SINGLE)
    np.testing.assert_array_equal(found, expected)
    assert not np.isnan(expected[: len(TASKS)]).any()


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (22, 10), (25, 13)])
def test_a_graph_is_right_in_the_opset_asked_for(
    exported: Path, run: Run, opset: int, ir_version: int
) -> None:
    """The checker and ONNX Runtime agree that it is; the file format is no newer than need be."""
    expected = answers(SINGLE)
    words = ("onnx", "--all-tasks", "--opset", str(opset), "-o", "other", "--json")
    assert run(*words).code == 0
    path = Path("other/model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    versions = {one.domain: one.version for one in model.opset_import}
    assert versions == {"": opset, "mtl_export": 1}
    assert {f.opset_import[0].version for f in model.functions} == {opset}
    assert model.ir_version == ir_version
    np.testing.assert_allclose(answers(path), expected, rtol=0, atol=NOISE)
    assert run(*words).json["outputs"][0]["status"] == "up to date"


@pytest.mark.parametrize("words", [["--opset", "17"], ["--opset", "26"], ["--opset", "new"]])
def test_an_opset_that_cannot_be_written_names_those_that_can(
    project: Path, run: Run, words: list[str]
) -> None:
    """A usage error before any work; from the environment and the toml likewise."""
    outcomes = [run("onnx", "--all-tasks", *words)]
    outcomes.append(run("onnx", "--all-tasks", env={"MTL_EXPORT_OPSET": words[1]}))
    for outcome in outcomes:
        assert outcome.code == 2
        assert "18<=x<=25" in outcome.stderr or "is not a valid integer" in outcome.stderr
    with (project / "mtl-export.toml").open("a") as file:
        file.write("\n[onnx]\nopset = 17\n")
    assert run("onnx", "--all-tasks").code == 2
    assert not (project / "out").exists()


def test_form_from_environment_and_settings_file(exported: Path, run: Run) -> None:
    """--inline and --opset are read where every option is; a merged graph ignores the former."""
    with (exported / "mtl-export.toml").open("a") as file:
        file.write("\n[onnx]\ninline = true\n")
    assert run("onnx", "--task", "spam").code == 0
    env = {"MTL_EXPORT_OPSET": "21"}
    assert run("onnx", "--all-tasks", "--force", env=env).code == 0
    assert not functions_of(SINGLE)
    assert onnx.load(str(SINGLE)).opset_import[0].version == 21
    for layout in (["--task", "spam"], ["--all-tasks", "--layout", "adapter-input"]):
        outcome = run("onnx", *layout, "--inline")
        assert outcome.code == 2
        assert "--inline" in outcome.stderr
