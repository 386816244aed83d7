"""``mtl-export trt`` as one job: every layout, failures, and graphs that were calibrated."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from mtl_export.bundle.manifest import read_manifest, write_manifest
from mtl_export.errors import EngineBuildError
from mtl_export.tensorrt.manifest import EngineManifest
from mtl_export.tensorrt.refit import EngineBuilder
from tests.cli.conftest import Run, files_below
from tests.factories import TASKS, WORDS

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

NAMES = [task.name for task in TASKS]
# The toy's margins are narrow: what is tested is not its accuracy.
CALIBRATE = ("calibrate", "--max-drop", "100", "--threads", "1", "--data", "rows.jsonl")


@pytest.fixture
def topic_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every build of the task ``topic`` be refused."""
    build = EngineBuilder.build

    def refusing(builder: EngineBuilder, onnx_path: Path, *values: object) -> EngineManifest:
        if onnx_path.parent.name == "topic":
            raise EngineBuildError(f"{onnx_path}: refused", fix="Try again")
        return build(builder, onnx_path, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(EngineBuilder, "build", refusing)


def test_a_failing_task_does_not_lose_the_others(
    exported: Path, run: Run, topic_fails: None
) -> None:
    """The table names it, its error is said, and the exit code is that of a builder's refusal."""
    outcome = run("trt", "--all-tasks", "--layout", "both")
    assert outcome.code == 6
    rows = {line.split()[0]: line for line in outcome.stdout.splitlines() if " " in line}
    assert "failed" in rows["out/engines/topic"]
    assert "written" in rows["out/engines/spam/model.engine"]
    assert "error: topic: out/onnx/topic/model.onnx: refused. Try again." in outcome.stderr
    assert not (exported / "out" / "engines" / "topic").exists()

    outcome = run("trt", "--all-tasks", "--layout", "both", "--json")
    assert outcome.code == 6
    document = outcome.json
    assert not document["ok"]
    assert document["exit_code"] == 6
    assert [output["status"] for output in document["outputs"]] == ["up to date"] * 3
    (failure,) = document["failures"]
    assert failure["name"] == "topic"
    assert failure["path"] == "out/engines/topic"
    assert failure["error"] == document["error"]
    assert failure["error"]["error"] == "EngineBuildError"


def test_a_strangers_file_is_the_failure_of_its_task_alone(exported: Path, run: Run) -> None:
    """It is refused as it would be alone; the others are built."""
    folder = exported / "out" / "engines" / "topic"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    outcome = run("trt", "--all-tasks", "--layout", "per-task", "--json")
    assert outcome.code == 2
    assert [one["name"] for one in outcome.json["failures"]] == ["topic"]
    paths = [output["path"] for output in outcome.json["outputs"]]
    assert paths == ["out/engines/ads_rel", "out/engines/spam"]
    assert files_below(folder) == ["notes.txt"]


def test_what_a_killed_run_left_is_removed(exported: Path, run: Run) -> None:
    """Also where nothing is left to build."""
    assert run("trt", "--task", "spam").code == 0
    for parent in ("out", "out/engines"):
        rest = exported / parent / ".engines.mtl-export-0123abcd"
        rest.mkdir()
        (rest / ".model.engine.part").write_bytes(b"half")
    assert run("trt", "--task", "spam").code == 0
    assert not [path for path in (exported / "out").rglob("*mtl-export-0123abcd*")]


def test_engines_of_calibrated_graphs(exported: Path, run: Run) -> None:
    """They lie in folders of their own; what is missing is refused with what to type."""
    words = ("trt", "--all-tasks", "--layout", "both", "--quantize", "int8")
    missing = run(*words)
    assert missing.code == 2
    assert "out/onnx-int8/model.onnx is missing" in missing.stderr
    assert "Run mtl-export calibrate --quantize int8 first." in missing.stderr
    one = run("trt", "--task", "spam", "--quantize", "int8")
    assert "Run mtl-export calibrate --quantize int8 --layout per-task first." in one.stderr

    words_of_rows = [word for word in WORDS if word.isalpha()]
    rows = [{"task": name, "text": f"{word} night"} for name in NAMES for word in words_of_rows[:4]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*CALIBRATE).code == 0
    outcome = run(*words, "--json")
    assert outcome.code == 0, outcome.stdout
    assert outcome.json["onnx"] == []
    paths = [output["path"] for output in outcome.json["outputs"]]
    assert paths == ["out/engines-int8", *(f"out/engines-int8/{name}" for name in NAMES)]
    recipe = json.loads(Path("out/engines-int8/spam/mtl-export.json").read_text())
    assert recipe["options"]["quantize"] == "int8"
    calibrated = json.loads(Path("out/onnx-int8/spam/mtl-export.json").read_text())
    graph = calibrated["files"]["model.onnx"]["sha256"]
    assert recipe["sources"]["onnx_sha256 model.onnx"] == graph
    again = run(*words, "--json")
    assert {output["status"] for output in again.json["outputs"]} == {"up to date"}

    stale = Path("out/onnx-int8/spam/model.onnx")
    kept, manifest = stale.read_bytes(), read_manifest(stale.parent)
    assert manifest is not None
    model = onnx.load(stale, load_external_data=False)
    helper.set_model_props(model, {"mtl_export.base_sha256": "0" * 64})
    onnx.save(model, stale)
    write_manifest(stale.parent, manifest.recipe)
    relabelled = run(*words)
    assert relabelled.code == 2
    assert "model.onnx is made from base 000000000000..., not from this one" in relabelled.stderr
    stale.write_bytes(kept)
    write_manifest(stale.parent, manifest.recipe)

    with Path("out/onnx-int8/topic/model.onnx").open("ab") as file:
        file.write(b"x")
    damaged = run(*words)
    assert damaged.code == 2
    assert "out/onnx-int8/topic/model.onnx is damaged" in damaged.stderr
    assert "mtl-export calibrate --quantize int8 --force" in damaged.stderr


@pytest.mark.parametrize(
    "words", [["--dtype", "fp16"], ["--task-input", "scalar"], ["--pooling", "mean"]], ids=" ".join
)
def test_calibrated_graphs_are_taken_as_they_are(
    exported: Path, run: Run, words: list[str]
) -> None:
    """What only an export decides is refused beside --quantize."""
    outcome = run("trt", "--all-tasks", "--quantize", "int8", *words)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: --quantize int8: ")
    assert words[0] in outcome.stderr
