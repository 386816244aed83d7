"""``mtl-export bench``: figures of what is there, reasons for what is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mtl_export.api.lineup import lineup
from mtl_export.api.settings import Settings
from mtl_export.bench.candidates import OnnxCandidate
from mtl_export.checkpoint.checkpoint import Task
from tests.cli.conftest import Run

QUICK = ("bench", "--shapes", "1x8,5x7", "--rounds", "2", "--threads", "1")


def test_everything_that_runs_is_measured(exported: Path, run: Run) -> None:
    """Both graphs and PyTorch on every shape, beside the merged one; engines say why not."""
    document = run(*QUICK, "--json").json
    names = ["per-task onnx", "single-graph onnx", "eager pytorch unmerged"]
    results = document["results"]
    assert [(r["shape"], r["artefact"]) for r in results] == [
        (shape, name) for shape in ("1x8", "5x7") for name in names
    ]
    for result in results:
        assert result["phase"] == "forward"
        assert result["calls"] >= 20
        assert 0 < result["p50_ms"] <= result["p95_ms"]
        rows, tokens = map(int, result["shape"].split("x"))
        assert result["tokens_per_s"] == pytest.approx(result["rows_per_s"] * tokens)
        assert result["rows_per_s"] * result["p50_ms"] / 1e3 < 2 * rows
        assert result["ratio_to_merged"] > 0
    assert [r["ratio_to_merged"] for r in results[::3]] == [1.0, 1.0]
    footprints = {one["subject"]: one for one in document["artefacts"]}
    assert list(footprints) == names
    for one in footprints.values():
        assert one["load_s"] > 0
        assert one["peak_bytes"] >= one["before_bytes"] > 0
    graph = exported / "out" / "onnx"
    files = sum((graph / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert footprints["single-graph onnx"]["file_bytes"] == files
    # A process that runs a graph has no torch in it.
    eager = footprints["eager pytorch unmerged"]["before_bytes"]
    assert footprints["single-graph onnx"]["before_bytes"] < eager / 2
    reasons = {one["artefact"]: one["reason"] for one in document["not_run"]}
    assert reasons["per-task engine"] == "not built; mtl-export trt --all-tasks makes it"
    conditions = document["conditions"]
    assert conditions["tasks"] == ["ads_rel", "topic", "spam"]
    assert conditions["threads"] == 1
    assert {"python", "onnxruntime", "torch"} <= set(conditions["versions"])


def test_people_get_tables(exported: Path, run: Run) -> None:
    """Times, memory and the machine; a graph that is not there is named with its command."""
    shutil.rmtree(exported / "out" / "onnx" / "topic")
    outcome = run(*QUICK, "--no-eager", "--task", "topic")
    assert outcome.code == 0, outcome.stderr
    assert "not run: per-task onnx: not exported; mtl-export onnx" in outcome.stdout
    assert "p50 ms" in outcome.stdout
    assert "load average" in outcome.stdout
    assert "tasks         topic, in turn" in outcome.stdout
    assert "eager" not in outcome.stdout


def test_engines_without_a_gpu_say_so(exported: Path, run: Run) -> None:
    """An engine that is there is not run, with the reason; alone it is exit code 6."""
    folder = exported / "out" / "engines"
    folder.mkdir()
    (folder / "model.engine").write_bytes(b"engine")
    outcome = run(*QUICK, "--no-eager", "--json")
    reasons = {one["artefact"]: one["reason"] for one in outcome.json["not_run"]}
    assert "model.engine.json" in reasons["single-graph engine"]
    shutil.rmtree(exported / "out" / "onnx")
    alone = run(*QUICK, "--json")
    assert alone.code == 6
    assert alone.json["error"]["error"] == "BackendMissingError"


def test_nothing_exported_is_a_usage_error(project: Path, run: Run) -> None:
    """Exit 2, with what to type, as the help says; 6 is for what is there and cannot be run."""
    for words in ((), ("--no-eager",)):
        outcome = run(*QUICK, *words)
        assert outcome.code == 2
        assert "mtl-export onnx --all-tasks" in outcome.stderr
    told = " ".join(run("bench", "--help").stdout.split())
    assert "Exit code 2 when nothing was exported, 6 when nothing of it can be run here." in told


def test_a_broken_graph_is_no_figure(exported: Path, run: Run) -> None:
    """Exit 6 with the file's name, whatever the others would give."""
    data = exported / "out" / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    outcome = run(*QUICK, "--no-eager", "--json")
    assert outcome.code == 6
    assert "model.onnx" in outcome.json["error"]["problem"]


def test_rows_longer_than_the_model_are_refused(exported: Path, run: Run) -> None:
    """Exit 2 with the limit, before anything is loaded."""
    outcome = run("bench", "--shapes", "1x8,2x41")
    assert outcome.code == 2
    assert "--shapes 2x41: 41 tokens. Expected at most 40" in outcome.stderr


def test_new_tokens_are_for_language_models(exported: Path, run: Run) -> None:
    """Typed for a classifier they are refused; of the environment they wait for a model."""
    outcome = run(*QUICK, "--new-tokens", "3")
    assert outcome.code == 2
    assert "--new-tokens 3: nothing that was exported generates" in outcome.stderr
    shutil.rmtree(exported / "out" / "onnx" / "topic")
    words = ("bench", "--shapes", "1x7", "--rounds", "1", "--no-eager", "--task", "topic")
    assert run(*words, env={"MTL_EXPORT_NEW_TOKENS": "3"}).code == 0


def test_a_shape_beyond_memory_is_refused(exported: Path, run: Run) -> None:
    """One line, exit 2, and no traceback."""
    outcome = run("bench", "--shapes", "99999999999x40", "--no-eager")
    assert outcome.code == 2
    assert "error: shape 99999999999x40: its inputs take" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_every_kind_of_graph_is_measured_under_its_adapter(tmp_path: Path) -> None:
    """Where adapters are inputs, the first task's; else the base alone would be timed."""
    for graph in ("model", "prefill", "encoder"):
        folder = tmp_path / graph / "adapter-input"
        folder.mkdir(parents=True)
        (folder / f"{graph}.onnx").touch()
        (folder / "short.onnx_adapter").touch()
        found = lineup(
            Settings(), [Task("short", 0)], tmp_path / graph, tmp_path / "engines",
            threads=1, new_tokens=2, with_eager=False,
        )  # fmt: skip
        (subject,) = found.subjects
        assert isinstance(subject, OnnxCandidate)
        assert (subject.first, subject.task) == (graph, "short")


def test_a_busy_machine_is_told() -> None:
    """Half the cores at work before the first call is worth a word."""
    from mtl_export.api.lineup import why_disturbed

    idle: dict[str, Any] = {"load_average": [0.4, 3.0, 3.0], "cores_usable": 2, "cores": 8}
    assert why_disturbed(idle) == ""
    assert "load 1.2 on 2 cores" in why_disturbed({**idle, "load_average": [1.2, 0.0, 0.0]})
    assert why_disturbed({**idle, "load_average": []}) == ""


@pytest.mark.parametrize("shapes", ["8", "8x", "0x4", "8x128x2", "axb", "8x16,,", "-1x4"])
def test_shapes_that_are_none_are_refused(exported: Path, run: Run, shapes: str) -> None:
    """Rows x tokens, nothing else."""
    outcome = run("bench", "--shapes", shapes)
    assert outcome.code == 2
    assert "such as 8x128" in outcome.stderr
