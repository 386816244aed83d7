"""What ``mtl-export verify`` says and how it ends."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mtl_export.bundle.manifest import read_manifest, write_manifest
from mtl_export.bundle.verify import VerifiedItem
from mtl_export.checkpoint.hashing import sha256_of_file
from tests.cli.conftest import Run


@pytest.fixture
def exported(project: Path, run: Run) -> Path:
    """Give the output folder of a project with two merged tasks."""
    for task in ("spam", "topic"):
        assert run("merge", "--task", task).code == 0
    return project / "out"


def test_options_and_digests_are_held(exported: Path, run: Run) -> None:
    """An edited option fails; a manifest written anew passes all but the digest expected."""
    folder = exported / "merged" / "spam"
    written = run("merge", "--task", "spam", "--json").json["outputs"][0]["manifest_sha256"]
    assert written == sha256_of_file(folder / "mtl-export.json")
    assert run("verify", str(folder), "--expect", written.upper()).code == 0
    manifest = read_manifest(folder)
    assert manifest is not None
    text = (folder / "mtl-export.json").read_text()
    (folder / "mtl-export.json").write_text(text.replace('"alpha": 5', '"alpha": 50'))
    edited = run("verify", "out")
    assert (edited.code, "manifest_sha256 is not that of the rest" in edited.stdout) == (7, True)
    options = {**manifest.recipe.options, "alpha": 50.0}
    write_manifest(folder, replace(manifest.recipe, options=options))
    assert run("verify", "out").code == 0
    outcome = run("verify", str(folder), "--expect", written)
    assert (outcome.code, f"none has the SHA-256 {written}" in outcome.stdout) == (7, True)
    assert run("verify", "out", "--expect", "12ab").code == 2


def test_a_folder_without_files_fails(exported: Path, run: Run) -> None:
    """That nothing is damaged of which nothing is left is no pass."""
    folder = exported / "merged" / "spam"
    manifest = read_manifest(folder)
    assert manifest is not None
    for name in manifest.files:
        (folder / name).unlink()
    write_manifest(folder, manifest.recipe)
    outcome = run("verify", str(folder))
    assert (outcome.code, "lists no config.json, which merge writes" in outcome.stdout) == (7, True)


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
    manifest = read_manifest(folder / "onnx" / "spam")
    assert manifest is not None
    sources = {**manifest.recipe.sources, "checkpoint_sha256": "0" * 64}
    write_manifest(folder / "onnx" / "spam", replace(manifest.recipe, sources=sources))
    outcome = run("verify", str(folder))
    assert outcome.code == 7
    assert f"mtl-export.json has checkpoint_sha256 {'0' * 64}, model.onnx has" in outcome.stdout


def test_what_golden_vectors_allow_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass within anything is none."""
    checks = [
        VerifiedItem(".", "files", "3 files", "passed"),
        VerifiedItem(".", "golden", "model.onnx, spam", "passed", within=1e-6),
        VerifiedItem(".", "golden", "model.onnx, mixed", "passed", within=1e9),
    ]
    monkeypatch.setattr("mtl_export.bundle.verify.verify_folder", lambda *_, **__: checks)
    assert "2 passed, errors up to 1.0e+09 allowed" in run("verify", "out").stdout
    assert run("verify", "out", "--json").json["checks"][1]["within"] == 1e-6
