from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import mtl_export.graph.parts
from mtl_export.bundle.manifest import read_manifest
from mtl_export.checkpoint.hashing import sha256_of_file
from tests.cli.conftest import Run, files_below
from tests.factories import TASKS
from tests.graph.constants import short_constants_below

FILES = (
    "config.json", "model.onnx", "model.onnx.data", "mtl-export.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
SHARED = "shared.onnx.data"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Count how often the base is traced."""
    seen: list[object] = []
    real = mtl_export.graph.parts.trace_parts

    def counted(bound: object, opset: int) -> object:
        seen.append(bound)
        return real(bound, opset)  # type: ignore[arg-type]

    monkeypatch.setattr(mtl_export.graph.parts, "trace_parts", counted)
    return seen


def test_both_layouts_lie_side_by_side(exported: Path) -> None:
    """The single graph lies at onnx/, each task's graph in a folder inside."""
    names = {"": FILES, **{f"{task.name}/": (*FILES, SHARED) for task in TASKS}}
    assert files_below(exported / "out" / "onnx") == sorted(
        folder + name for folder, files in names.items() for name in files
    )


def test_all_graphs_come_from_one_trace(project: Path, run: Run, traces: list[object]) -> None:
    """Three tasks cost one export; a second run costs none."""
    assert run("onnx", "--all-tasks", "--layout", "per-task").code == 0
    assert len(traces) == 1
    again = run("onnx", "--all-tasks", "--layout", "per-task", "--json")
    assert len(traces) == 1
    assert [output["status"] for output in again.json["outputs"]] == ["up to date"] * 3


def test_a_named_task_means_its_merged_graph(
    exported: Path, run: Run, traces: list[object]
) -> None:
    """``onnx --task NAME`` is that task's per-task graph."""
    outcome = run("onnx", "--task", "spam", "--json")
    assert [output["path"] for output in outcome.json["outputs"]] == ["out/onnx/spam"]
    assert [output["status"] for output in outcome.json["outputs"]] == ["up to date"]
    assert not traces


def test_a_single_graph_of_some_tasks_is_refused(exported: Path, run: Run) -> None:
    """The single graph serves all tasks; half of it is no layout."""
    outcome = run("onnx", "--task", "spam", "--layout", "single-graph")
    assert outcome.code == 2
    assert "--all-tasks" in outcome.stderr


def test_half_precision_graphs_are_judged_by_their_own_noise(exported: Path, run: Run) -> None:
    """fp16 passes beside fp16's noise floor; bf16 is not run here, and so never passed."""
    assert run("onnx", "--all-tasks", "--dtype", "fp16", "--force").code == 0
    assert run("onnx", "--task", "spam", "--dtype", "bf16", "--force").code == 0
    outcome = run("parity", "--json")
    assert outcome.code == 0, outcome.stdout
    assert set(outcome.json["noise_floors"]) == {"bf16", "fp16", "fp32"}
    verdicts: dict[str, set[str]] = {}
    unasked = {"config", "companions", "inputs and outputs", "stored dtype"}  # these need no run
    for cell in outcome.json["cells"]:
        if cell["case"] in unasked or "left out" in cell["reason"]:
            continue
        key = f"{cell['artefact']} {'spam' if cell['task'] == 'spam' else ''}".rstrip()
        verdicts.setdefault(key, set()).add(cell["verdict"])
    assert verdicts["single-graph onnx"] == {"passed"}
    assert verdicts["per-task onnx"] == {"passed"}
    assert verdicts["per-task onnx spam"] == {"not-run"}
    manifest = read_manifest(exported / "out" / "onnx")
    assert manifest is not None
    assert manifest.recipe.options["dtype"] == "fp16"


def test_the_single_graph_can_be_replaced_without_losing_the_others(
    exported: Path, run: Run
) -> None:
    """--force on the single graph leaves the graphs of the tasks where they are."""
    (exported / "out" / "onnx" / "model.onnx").write_bytes(b"damaged")
    before = (exported / "out" / "onnx" / "spam" / "model.onnx").read_bytes()
    assert run("onnx", "--all-tasks").code == 2
    assert run("onnx", "--all-tasks", "--force").code == 0
    assert (exported / "out" / "onnx" / "spam" / "model.onnx").read_bytes() == before
    assert (exported / "out" / "onnx" / "model.onnx").read_bytes() != b"damaged"


def test_what_tasks_have_in_common_is_in_every_manifest(exported: Path, run: Run) -> None:
    """One hash for all folders, that of the file; a damaged one is noticed and replaced."""
    parent = exported / "out" / "onnx"
    manifests = [read_manifest(parent / task.name) for task in TASKS]
    entries = {manifest.files[SHARED] for manifest in manifests if manifest}
    assert len(entries) == 1
    assert entries.pop().sha256 == sha256_of_file(parent / "spam" / SHARED)
    with (parent / "spam" / SHARED).open("r+b") as file:
        file.write(b"damaged")
    words = ("onnx", "--all-tasks", "--layout", "per-task")
    assert run(*words).code == 2
    outcome = run(*words, "--force", "--json")
    assert [output["status"] for output in outcome.json["outputs"]] == [
        "up to date", "up to date", "written",
    ]  # fmt: skip
    assert (parent / "spam" / SHARED).read_bytes() == (parent / "topic" / SHARED).read_bytes()


def test_linked_folders_are_one_file_on_disk(project: Path, run: Run) -> None:
    """--link-data: one inode for all tasks, and a repeated command leaves it."""
    words = ("onnx", "--all-tasks", "--layout", "per-task", "--link-data")
    assert run(*words).code == 0
    shared = [project / "out" / "onnx" / task.name / SHARED for task in TASKS]
    assert {path.stat().st_nlink for path in shared} == {len(TASKS)}
    assert len({path.stat().st_ino for path in shared}) == 1
    again = run(*words, "--json")
    assert [output["status"] for output in again.json["outputs"]] == ["up to date"] * 3


def test_adapters_as_input_from_export_to_parity(project: Path, run: Run) -> None:
    """A folder of its own with one file per task; parity compares it, verify replays it."""
    words = ("onnx", "--all-tasks", "--layout", "adapter-input")
    assert run(*words).code == 0
    adapters = [f"{task.name}.onnx_adapter" for task in TASKS]
    folder = project / "out" / "onnx" / "adapter-input"
    assert files_below(folder) == sorted([*FILES, *adapters])
    assert short_constants_below(folder) == []
    again = run(*words, "--json")
    assert [output["status"] for output in again.json["outputs"]] == ["up to date"]
    rows = [{"task": task.name, "text": text} for task in TASKS for text in ("good film", "who")]
    (project / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run("parity", "--inputs", "texts.jsonl", "--golden", "--json").json
    cells = [cell for cell in report["cells"] if cell["artefact"] == "adapter-input onnx"]
    assert sum(cell["verdict"] == "passed" for cell in cells) > 15
    # Its tensors of one task lie in a file of their own, so there is nothing to exchange.
    left = {cell["reason"] for cell in cells if cell["verdict"] != "passed"}
    assert left <= {
        "none of its tensors can be exchanged from outside", "it holds no stacks of tasks",
        "left out without --full",
    }  # fmt: skip
    assert run("verify", str(folder)).code == 0


IDLE = {
    "--task-input scalar": [
        ["--all-tasks", "--layout", "per-task", "--task-input", "scalar"],
        ["--task", "spam", "--task-input", "scalar"],
    ],
    "--link-data": [
        ["--all-tasks", "--layout", "single-graph", "--link-data"],
        ["--all-tasks", "--link-data"],
        ["--all-tasks", "--layout", "adapter-input", "--link-data"],
    ],
    "--pooling": [["--all-tasks", "--pooling", "mean"], ["--task", "spam", "--pooling", "cls"]],
}


@pytest.mark.parametrize("option", IDLE)
def test_an_option_that_would_do_nothing_is_refused_before_any_work(
    project: Path, run: Run, traces: list[object], option: str
) -> None:
    """What has no effect on the graphs asked for, and what a model with a head cannot give."""
    for words in IDLE[option]:
        outcome = run("onnx", *words)
        assert outcome.code == (5 if option == "--pooling" else 2)
        assert f"error: {option}: " in outcome.stderr
    assert not traces
    assert files_below(project / "out") == []


def test_what_the_settings_file_says_of_other_graphs_breaks_none(exported: Path, run: Run) -> None:
    """A default for the single graph does not stand in the way of merged ones."""
    with (exported / "mtl-export.toml").open("a") as file:
        file.write('\n[onnx]\ntask_input = "scalar"\n')
    assert run("onnx", "--task", "spam", env={"MTL_EXPORT_LINK_DATA": "1"}).code == 0
    assert run("onnx", "--task", "spam", "--task-input", "rows").code == 0


def test_adapters_need_onnx_runtime_and_take_no_other_form(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch, traces: list[object]
) -> None:
    """It alone writes their format; what an adapter cannot be is said before any work."""
    words = ("onnx", "--all-tasks", "--layout", "adapter-input")
    for more in (["--dtype", "fp16"], ["--task-input", "scalar"], ["--pooling", "mean"]):
        outcome = run(*words, *more)
        assert outcome.code == 2
        assert more[0] in outcome.stderr
    assert run("onnx", "--task", "spam", "--layout", "adapter-input").code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = run(*words)
    assert outcome.code == 6
    assert "mtl-export[cpu]" in outcome.stderr
    assert not traces
    assert not (project / "out" / "onnx" / "adapter-input").exists()
