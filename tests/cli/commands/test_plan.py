from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run, files_below


def test_every_strategy_has_a_row(project: Path, run: Run) -> None:
    """The table names them, the last lines say which to take and what to type."""
    outcome = run("plan")
    assert outcome.code == 0
    for name in ("merged, standalone", "merged, shared", "single graph", "engine per task"):
        assert name in outcome.stdout
    assert "recommended  single graph: one copy of the base serves all 3 tasks" in outcome.stdout
    assert "mtl-export onnx --all-tasks" in outcome.stdout
    assert files_below(project / "out") == []


def test_json_has_the_figures(project: Path, run: Run) -> None:
    """Programs get bytes and seconds; the merged size is the one merge then writes."""
    document = run("plan", "--task", "spam", "--json").json
    assert document["ok"] is True
    assert document["recommended"] == "merged, standalone"
    merged = document["strategies"][0]
    assert merged["command"] == "mtl-export merge --task spam"
    (output,) = run("merge", "--task", "spam", "--json").json["outputs"]
    assert output["files"]["model.safetensors"]["size_bytes"] == merged["disk_bytes"]
