from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mtl_export.api.engine_shapes import profile_from_options
from mtl_export.errors import UsageError
from tests.cli.conftest import Run, files_below

ENGINE_FILES = ["model.engine", "model.engine.json", "mtl-export.json"]
needs_builder = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="no TensorRT that builds without a GPU is installed",
)


@needs_builder
def test_one_engine_serves_all_tasks(exported: Path, run: Run) -> None:
    """``trt --all-tasks`` builds the single graph, and says what was not run here."""
    outcome = run("trt", "--all-tasks")
    assert outcome.code == 0, outcome.stderr
    assert files_below(exported / "out" / "engines") == ENGINE_FILES
    for cell in ("artefact", "out/engines/model.engine", "ads_rel, topic, spam", "not run here: "):
        assert cell in outcome.stdout
    assert "ONNX out/onnx: up to date." in outcome.stderr
    manifest = json.loads((exported / "out" / "engines" / "model.engine.json").read_text())
    assert "task_ids" in [tensor["name"] for tensor in manifest["inputs"]]
    again = run("trt", "--all-tasks", "--json")
    assert [output["status"] for output in again.json["outputs"]] == ["up to date"]


@needs_builder
def test_an_edited_graph_is_built_from_as_it_lies(exported: Path, run: Run) -> None:
    """The engine serves its tasks; another form is refused, and parity knows the engine."""
    assert run("tasks", "add", "out/onnx", "copy", "-c", "adapter", "--from", "spam").code == 0
    before = (exported / "out" / "onnx" / "model.onnx").read_bytes()
    narrow = run("trt", "--all-tasks", "--dtype", "fp16")
    assert narrow.code == 2
    assert "Leave --dtype out" in narrow.stderr
    outcome = run("trt", "--all-tasks", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["outputs"][0]["tasks"] == ["ads_rel", "topic", "spam", "copy"]
    assert (exported / "out" / "onnx" / "model.onnx").read_bytes() == before
    assert run("trt", "--all-tasks", "--json").json["outputs"][0]["status"] == "up to date"
    assert run("verify", "out/engines").code in {0, 6}
    parity = run("parity", "--quick", "--json")
    engine = [c for c in parity.json["cells"] if c["artefact"] == "single-graph engine"]
    assert not [cell for cell in engine if cell["verdict"] == "failed"]
    (exported / "out" / "onnx" / "config.json").write_text("{}")
    assert run("trt", "--all-tasks").code == 7


@needs_builder
def test_a_missing_graph_is_exported_first(project: Path, run: Run) -> None:
    """An engine needs its graph; making it is said on stderr."""
    outcome = run("trt", "--task", "spam")
    assert outcome.code == 0, outcome.stderr
    assert "ONNX out/onnx/spam: written." in outcome.stderr
    assert (project / "out" / "onnx" / "spam" / "model.onnx").is_file()
    assert (project / "out" / "engines" / "spam" / "model.engine").is_file()


@needs_builder
def test_other_shapes_are_another_engine(exported: Path, run: Run) -> None:
    """The profile is part of the recipe: changing it asks for --force."""
    run("trt", "--task", "spam")
    outcome = run("trt", "--task", "spam", "--max-shapes", "input_ids:16x20")
    assert outcome.code == 2
    assert "profile was" in outcome.stderr
    assert run("trt", "--task", "spam", "--max-shapes", "input_ids:16x20", "--force").code == 0
    manifest = json.loads((exported / "out/engines/spam/model.engine.json").read_text())
    assert manifest["profiles"][0]["attention_mask"]["max"] == [16, 20]


@needs_builder
def test_wrong_shapes_are_refused_before_building(exported: Path, run: Run) -> None:
    """A name that is no input, text that is no shape, or sizes that no row can have."""
    for shapes in ("inputs:1x16", "input_ids:1by16", "input_ids:1", "input_ids:0x0",
                   "input_ids:4x100000"):  # fmt: skip
        outcome = run("trt", "--task", "spam", "--max-shapes", shapes)
        assert outcome.code == 2, outcome.stderr
    assert not (exported / "out" / "engines").exists()


@pytest.mark.parametrize(
    "words", [["--fp16"], ["--int8"], ["--best"], ["--calib", "cache.bin"]], ids=" ".join
)
def test_switches_of_old_are_answered(run: Run, words: list[str]) -> None:
    """What trtexec users type gets told what holds instead, and is not in the help."""
    outcome = run("trt", *words)
    assert outcome.code == 2
    assert outcome.stderr.startswith(f"error: {words[0]}: ")
    assert "strongly typed" in outcome.stderr
    assert words[0] not in run("trt", "--help").stdout


def test_no_builder_exits_6(exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any TensorRT the message has the pip command, and nothing is written."""
    import mtl_export.tensorrt.available as available

    def no_library(name: str) -> object:
        raise ImportError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(available, "load_library", no_library)
    outcome = run("trt", "--all-tasks")
    assert outcome.code == 6
    assert "pip install" in outcome.stderr
    assert not (exported / "out" / "engines").exists()


def test_shapes_follow_by_dimension(graphs: Path) -> None:
    """What is said of one input holds for all that share the dimension's name."""
    model = graphs / "out" / "onnx" / "model.onnx"
    profile = profile_from_options(model, None, "input_ids:4x10", "input_ids:16x20")
    assert dict(profile.shapes) == {
        "input_ids": ((1, 1), (4, 10), (16, 20)),
        "attention_mask": ((1, 1), (4, 10), (16, 20)),
        "token_type_ids": ((1, 1), (4, 10), (16, 20)),
        "task_ids": ((1,), (4,), (16,)),
    }


def test_defaults_are_bent_to_what_is_given(graphs: Path) -> None:
    """A small maximum lowers the default optimum; a large minimum raises it."""
    model = graphs / "out" / "onnx" / "model.onnx"
    low = profile_from_options(model, None, None, "input_ids:2x3")
    assert low.shapes["input_ids"] == ((1, 1), (2, 3), (2, 3))
    high = profile_from_options(model, "input_ids:20x30", None, None)
    assert high.shapes["input_ids"] == ((20, 30), (20, 40), (32, 40))


def test_contradicting_shapes_are_refused(graphs: Path) -> None:
    """A minimum above the maximum is the user's mistake, not bent."""
    model = graphs / "out" / "onnx" / "model.onnx"
    with pytest.raises(UsageError, match="is not 1 <= min <= opt <= max"):
        profile_from_options(model, "input_ids:9x9", None, "input_ids:2x3")
