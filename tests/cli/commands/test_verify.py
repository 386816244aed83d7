"""What ``mtl-export verify`` says and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mtl_export.bundle.verify import Check
from tests.cli.conftest import Run


@pytest.fixture
def exported(project: Path, run: Run) -> Path:
    """Give the output folder of a project with two merged tasks."""
    for task in ("spam", "topic"):
        assert run("merge", "--task", task).code == 0
    return project / "out"


def test_a_cache_is_a_remark_and_no_damage(exported: Path, run: Run) -> None:
    """The folder of a project that was calibrated passes, and says what was not checked."""
    (exported / "calibration").mkdir()
    (exported / "calibration" / "task-spam.int8.ranges.json").write_text("{}")
    outcome = run("verify", "out")
    assert outcome.code == 0
    assert "remark: ., calibration: the cache of mtl-export calibrate" in outcome.stdout
    assert "verify passed" in outcome.stdout
    (exported / "calibration" / "run.sh").write_text("")
    assert run("verify", "out").code == 7


def test_a_task_without_a_folder_fails_who_requires_all(exported: Path, run: Run) -> None:
    """It is a remark with exit code 0, or 7 with --require-all-tasks."""
    said = "merged, 1 of 3 tasks have no folder: ads_rel"
    remarked = run("verify", "out")
    assert (remarked.code, f"remark: {said}" in remarked.stdout) == (0, True)
    failed = run("verify", "out", "--require-all-tasks")
    assert (failed.code, f"FAILED {said}" in failed.stdout) == (7, True)
    document = run("verify", "out", "--json").json
    (remark,) = [check for check in document["checks"] if check["kind"] == "remark"]
    assert (remark["folder"], remark["verdict"]) == ("merged", "not-run")
    assert run("merge", "--all-tasks").code == 0
    assert run("verify", "out", "--require-all-tasks").code == 0
    shutil.rmtree(exported / "merged" / "spam")
    assert run("verify", "out", "--require-all-tasks").code == 7


def test_a_graph_keeps_the_sources_it_was_made_from(graphs: Path, tmp_path: Path, run: Run) -> None:
    """Every graph passes; with another checkpoint in its manifest it does not."""
    folder = shutil.copytree(graphs / "out", tmp_path / "out")
    assert run("verify", str(folder), "--require-all-tasks").code == 0
    path = folder / "onnx" / "spam" / "mtl-export.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["checkpoint_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    outcome = run("verify", str(folder))
    assert outcome.code == 7
    assert f"mtl-export.json has checkpoint_sha256 {'0' * 64}, model.onnx has" in outcome.stdout


def test_what_golden_vectors_allow_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass within anything is none."""
    checks = [
        Check(".", "files", "3 files", "passed"),
        Check(".", "golden", "model.onnx, spam", "passed", within=1e-6),
        Check(".", "golden", "model.onnx, mixed", "passed", within=1e9),
    ]
    monkeypatch.setattr("mtl_export.bundle.verify.verify_folder", lambda *_, **__: checks)
    assert "2 passed, errors up to 1.0e+09 allowed" in run("verify", "out").stdout
    assert run("verify", "out", "--json").json["checks"][1]["within"] == 1e-6
