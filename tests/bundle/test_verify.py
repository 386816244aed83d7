from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from mtl_export.bundle.manifest import (
    MANIFEST_FILE,
    OptionValue,
    Recipe,
    add_to_manifest,
    write_manifest,
)
from mtl_export.bundle.staging import locked
from mtl_export.bundle.verify import NO_TORCH, NO_VECTORS, REMARK, VerifiedItem, verify_folder
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import BackendMissingError, IntegrityError, UsageError
from mtl_export.runtime.golden import GOLDEN_FILE, Vector, golden_bytes
from mtl_export_calibration.cache import open_cache

SOURCES = {"base_sha256": "ba" * 32, "checkpoint_sha256": "cd" * 32}
RECIPE = Recipe("onnx", {}, SOURCES, "0")
MERGED = Recipe("merge", {}, SOURCES, "0")
EXAMPLE_ENGINE = """{
  "schema": "mtl-export.engine/1",
  "engine": {"file": "model.engine", "sha256": "", "size_bytes": 6, "graph_sha256": ""},
  "source": {"file": "model.onnx", "sha256": {}}, "provenance": {},
  "layout": "", "tasks": [], "inputs": [], "outputs": [], "profiles": [], "precision": [],
  "tf32": false, "builder": {"name": "tensorrt", "version": "11.0", "options": {}},
  "libraries": {}, "targets": [], "validated": []
}"""


def model(path: Path, factor: float = 2.0, metadata: dict[str, str] | None = None) -> None:
    """Write a graph that multiplies by ``factor``."""
    nodes = [helper.make_node("Mul", ["x", "f"], ["logits"])]
    factors = [helper.make_tensor("f", TensorProto.FLOAT, [], [factor])]
    shape: tuple[str | int | None, ...] = ("batch", 2)
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        factors,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(made, metadata or {})
    save(made, path)
    path.with_name("model.onnx.data").touch()


def golden(folder: Path, *names: str) -> None:
    """Save golden vectors of ``y = 2 x``, and list them."""
    x = np.array([[1, 2], [3, 4]], np.float32)
    vectors = [Vector(name, "model.onnx", {"x": x}, {"logits": 2.0 * x}, 1e-6, 0) for name in names]
    (folder / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
    add_to_manifest(folder, GOLDEN_FILE)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return an output folder of a graph and a nested one of another."""
    root = tmp_path / "out" / "onnx"
    for folder in (root, root / "spam"):
        folder.mkdir(parents=True)
        model(folder / "model.onnx")
        (folder / "config.json").write_text("{}")
        write_manifest(folder, RECIPE)
    golden(root, "spam", "mixed")
    return root


def verdicts(checks: list[VerifiedItem]) -> list[tuple[str, str, str]]:
    """Return folder, kind and verdict of each check."""
    return [(one.folder, one.kind, one.verdict) for one in checks]


def test_a_whole_folder_passes(out: Path) -> None:
    """Its files, its golden vectors, and the outputs inside it; what cannot run says so."""
    checks = verify_folder(out)
    assert verdicts(checks) == [
        (".", "files", "passed"), (".", "golden", "passed"), (".", "golden", "passed"),
        ("spam", "files", "passed"), ("spam", "golden", "not-run"),
    ]  # fmt: skip
    assert [one.what for one in checks[:3]] == ["4 files", "model.onnx, spam", "model.onnx, mixed"]
    digest = sha256_of_file(out / MANIFEST_FILE)
    assert [one.manifest_sha256 for one in checks[:2]] == [digest, ""]
    assert [one.within for one in checks] == [None, 1e-6, 1e-6, None, None]
    assert checks[-1].reason == NO_VECTORS
    assert verify_folder(out / "spam")[0].folder == "."
    above = verify_folder(out.parent)
    assert [one.folder for one in above] == ["onnx"] * 3 + ["onnx/spam"] * 2


def flip(path: str) -> Callable[[Path], None]:
    """Return a fault: one bit."""

    def apply(out: Path) -> None:
        content = bytearray((out / path).read_bytes())
        content[-1] ^= 1
        (out / path).write_bytes(bytes(content))

    return apply


def swap(out: Path) -> None:
    """Give the manifest another hash for a file of the same size."""
    text = (out / MANIFEST_FILE).read_text()
    digest = text.partition('"sha256": "')[2][:64]
    (out / MANIFEST_FILE).write_text(text.replace(digest, digest[::-1]))


def add_folder(out: Path) -> None:
    """Add a folder with a file."""
    (out / "sub").mkdir()
    (out / "sub" / "x").touch()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the model": (flip("model.onnx"), "model.onnx has changed"),
    "a bit of a golden vector": (flip(GOLDEN_FILE), "golden.npz has changed"),
    "a file cut": (lambda out: (out / "config.json").write_text("{"), "has 1 bytes, not 2"),
    "a file gone": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "a file added": (lambda out: (out / "run.sh").touch(), "run.sh is not in the manifest"),
    "a hidden file added": (lambda out: (out / ".x").touch(), ".x is not in the manifest"),
    "a link added": (lambda out: (out / "l").symlink_to("/etc"), "l is not in the manifest"),
    "a folder with a file added": (add_folder, "sub/x is not in the manifest"),
    "another hash in the manifest": (swap, "manifest_sha256 is not that of the rest"),
    "a manifest that is none": (
        lambda out: (out / MANIFEST_FILE).write_text("{}"), "Restore it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_fails_and_nothing_is_run(out: Path, fault: str) -> None:
    """A file that is not what was written fails; its model is not opened."""
    change, reason = DAMAGE[fault]
    change(out)
    checks = [one for one in verify_folder(out) if one.folder == "."]
    assert checks[0].kind == "files"
    assert checks[0].verdict == "failed"
    assert reason in checks[0].reason
    assert all(one.verdict == "not-run" for one in checks[1:])


def test_a_nested_output_without_its_manifest_fails(out: Path) -> None:
    """Its files then belong to nobody, so that a folder cannot escape the check."""
    (out / "spam" / MANIFEST_FILE).unlink()
    (files, *_) = verify_folder(out)
    assert files.verdict == "failed"
    assert "spam/config.json is not in the manifest" in files.reason
    (out / MANIFEST_FILE).unlink()
    with pytest.raises(IntegrityError, match=r"no mtl-export\.json in it or below"):
        verify_folder(out)


def test_a_file_among_outputs_fails(out: Path) -> None:
    """What lies beside the outputs is in no manifest."""
    (out.parent / "notes.txt").write_text("x")
    checks = verify_folder(out.parent)
    assert checks[0] == VerifiedItem(
        ".", "files", "notes.txt", "failed", "notes.txt belongs to no manifest"
    )


def test_the_rest_of_a_killed_run_fails_and_a_run_at_work_is_a_remark(out: Path) -> None:
    """Nothing says what it holds, at any depth; of a live one, who looks knows that it is."""
    rests = [parent / ".onnx-int8.mtl-export-0123abcd" for parent in (out.parent, out)]
    for rest in rests:
        rest.mkdir()
        write_manifest(rest, RECIPE)
        (rest / "half").write_text("half")
    failed = [one for one in verify_folder(out.parent) if one.verdict == "failed"]
    assert [one.what for one in failed] == [rests[0].name, f"onnx/{rests[1].name}"]
    assert {one.reason for one in failed} == {
        "the rest of a killed run: run its command again, or delete it"
    }
    with locked(rests[0], exclusive=True, wait=False), locked(rests[1], exclusive=True, wait=False):
        checks = verify_folder(out.parent)
    assert not [one for one in checks if one.verdict == "failed"]
    remarks = [one for one in checks if one.kind == REMARK]
    assert [one.what for one in remarks] == [one.what for one in failed]
    assert {one.reason for one in remarks} == {"a run is writing it now"}
    (out / ".file.mtl-export-0123abcd").touch()
    reasons = [one.reason for one in verify_folder(out) if one.folder == "." and one.reason]
    assert ".file.mtl-export-0123abcd is not in the manifest" in reasons


@pytest.mark.parametrize("name", ["a.json", "a.json.partial", "rows.npz", "fp16-x/ANY", ".x"])
def test_what_lies_in_the_cache_of_calibrate_is_listed_or_fails(out: Path, name: str) -> None:
    """A file that its manifest does not list fails, and so does a cache without one."""
    place = out.parent / "calibration"
    with open_cache(place):
        (place / "ranges.json").write_text("{}")
    assert "calibration" in [one.folder for one in verify_folder(out.parent)]
    assert not [one for one in verify_folder(out.parent) if one.verdict == "failed"]
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).touch()
    (failed,) = [one for one in verify_folder(out.parent) if one.verdict == "failed"]
    assert failed.reason == f"{name} is not in the manifest"
    (place / MANIFEST_FILE).unlink()
    reasons = [one.reason for one in verify_folder(out.parent) if one.verdict == "failed"]
    assert f"calibration/{name} belongs to no manifest" in reasons


def test_only_the_expected_manifests_pass(out: Path) -> None:
    """Each of them must be there, and no other: a folder can be written again as a whole."""
    digests = [sha256_of_file(folder / MANIFEST_FILE) for folder in (out, out / "spam")]
    assert not [one for one in verify_folder(out, expected=digests) if one.verdict == "failed"]
    (failed,) = [one for one in verify_folder(out, expected=digests[:1]) if one.verdict == "failed"]
    assert (failed.folder, digests[1] in failed.reason) == ("spam", True)
    write_manifest(out / "spam", Recipe("onnx", {"alpha": 50}, SOURCES, "0"))
    assert not [one for one in verify_folder(out) if one.verdict == "failed"]
    failed, absent = (
        one for one in verify_folder(out, expected=digests) if one.verdict == "failed"
    )
    assert (failed.folder, failed.what) == ("spam", MANIFEST_FILE)
    assert absent.reason == f"none has the SHA-256 {digests[1]}"


@pytest.mark.parametrize(("atol", "rtol"), [(1e9, 0.0), (0.0, 1.0), (-1.0, 0.0)])
def test_tolerances_that_any_answer_meets_fail(out: Path, atol: float, rtol: float) -> None:
    """A pass within them would show nothing, and parity --golden never saves such."""
    x = np.array([[1, 2], [3, 4]], np.float32)
    vector = Vector("spam", "model.onnx", {"x": x}, {"logits": 2.0 * x}, atol, rtol)
    (out / GOLDEN_FILE).write_bytes(golden_bytes([vector]))
    add_to_manifest(out, GOLDEN_FILE)
    _, replayed, *_ = verify_folder(out)
    assert replayed.verdict == "failed"
    assert "no answer is larger than 8: any would pass" in replayed.reason


def test_a_task_without_a_folder_is_told(tmp_path: Path) -> None:
    """Where tasks have folders of their own, one without is named; it may never have had one."""
    options: dict[str, OptionValue] = {"tasks": ["ham", "spam"], "layout": "per-task"}
    for task in ("ham", "spam"):
        (tmp_path / "onnx" / task).mkdir(parents=True)
        model(tmp_path / "onnx" / task / "model.onnx")
        (tmp_path / "onnx" / task / "config.json").write_text("{}")
        recipe = Recipe("onnx", {**options, "served": [task]}, SOURCES, "0")
        write_manifest(tmp_path / "onnx" / task, recipe)
    assert not [one for one in verify_folder(tmp_path) if one.kind == REMARK]
    assert verify_folder(tmp_path, all_tasks=True) == verify_folder(tmp_path)
    assert len(verify_folder(tmp_path / "onnx" / "ham", all_tasks=True)) == 2
    shutil.rmtree(tmp_path / "onnx" / "spam")
    what = "1 of 2 tasks have no folder"
    *_, remark = verify_folder(tmp_path)
    assert remark == VerifiedItem("onnx", REMARK, what, "not-run", "spam")
    *_, failed = verify_folder(tmp_path, all_tasks=True)
    assert failed == VerifiedItem("onnx", "files", what, "failed", "spam")


def test_other_sources_in_the_manifest_than_in_the_graph_fail(tmp_path: Path) -> None:
    """An edited manifest cannot give a graph to another checkpoint."""
    model(tmp_path / "model.onnx", metadata={"mtl_export.checkpoint_sha256": "ab" * 32})
    (tmp_path / "config.json").write_text("{}")
    found = []
    for digest in ("ab" * 32, "cd" * 32):
        sources = {"checkpoint_sha256": digest, "base_sha256": "ef" * 32}
        write_manifest(tmp_path, Recipe("onnx", {}, sources, "0"))
        found.append(verify_folder(tmp_path)[0])
    assert [check.verdict for check in found] == ["passed", "failed"]
    assert f"checkpoint_sha256 {'cd' * 32}, model.onnx has {'ab' * 32}" in found[1].reason


def test_other_sources_in_the_manifest_than_in_the_engine_fail(tmp_path: Path) -> None:
    """An engine's own manifest has those of its graph; one that names none is not asked."""
    (tmp_path / "model.engine").write_bytes(b"engine")
    about = json.loads(EXAMPLE_ENGINE)
    found = []
    for provenance in ({}, {"checkpoint_sha256": "ab" * 32}):
        about["provenance"] = provenance
        (tmp_path / "model.engine.json").write_text(json.dumps(about))
        write_manifest(tmp_path, Recipe("trt", {}, SOURCES, "0"))
        found.append(verify_folder(tmp_path)[0])
    assert found[0].verdict == "passed"
    assert "model.engine has" in found[1].reason


def test_a_file_of_several_folders_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they link to it or refer to it."""
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.suffix)
        return sha256_of_file(path)

    weights = "m.safetensors"
    for name in ("shared", "linked", "referring"):
        (tmp_path / name).mkdir()
        for companion in ("config.json", "merge-report.json"):
            (tmp_path / name / companion).touch()
    (tmp_path / "shared" / weights).write_bytes(b"1234")
    os.link(tmp_path / "shared" / weights, tmp_path / "linked" / weights)
    files = write_manifest(tmp_path / "shared", MERGED).files
    write_manifest(tmp_path / "linked", MERGED)
    write_manifest(tmp_path / "referring", MERGED, beside={f"../shared/{weights}": files[weights]})
    monkeypatch.setattr("mtl_export.bundle.verify.sha256_of_file", counted)
    assert {one.verdict for one in verify_folder(tmp_path) if one.kind == "files"} == {"passed"}
    assert read.count(".safetensors") == 1


def test_another_answer_fails_though_all_hashes_are_right(out: Path) -> None:
    """A model exchanged together with its manifest is caught by what it answers."""
    model(out / "model.onnx", factor=2.001)
    write_manifest(out, RECIPE)
    files, *replayed = verify_folder(out)
    assert files.verdict == "passed"
    assert [one.verdict for one in replayed[:2]] == ["failed", "failed"]
    assert "4 of 4 values of logits differ" in replayed[0].reason


def test_golden_vectors_that_cannot_be_read_fail(out: Path) -> None:
    """A listed file that is no archive is no pass."""
    (out / GOLDEN_FILE).write_bytes(b"no archive")
    write_manifest(out, RECIPE)
    assert [one.verdict for one in verify_folder(out)][:2] == ["passed", "failed"]


def test_a_model_that_the_runtime_refuses_fails(out: Path) -> None:
    """It was run where the vectors were saved."""
    (out / "model.onnx").write_bytes(b"no graph")
    write_manifest(out, RECIPE)
    _, refused, *_ = verify_folder(out)
    assert refused.verdict == "failed"
    assert "onnxruntime cannot open it" in refused.reason


def test_a_missing_runtime_is_not_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files pass, the replay says what is missing."""

    def missing(self: object) -> object:
        raise BackendMissingError("onnxruntime: not installed")

    monkeypatch.setattr("mtl_export.runtime.ort.OrtRunner.__enter__", missing)
    files, replay, *_ = verify_folder(out)
    assert (files.verdict, replay.verdict) == ("passed", "not-run")
    assert "not installed" in replay.reason


def test_a_merged_folder_says_who_runs_it(tmp_path: Path) -> None:
    """Only PyTorch does, and verify does not import it."""
    for name in ("config.json", "merge-report.json", "model.safetensors"):
        (tmp_path / name).touch()
    write_manifest(tmp_path, MERGED)
    files, replay = verify_folder(tmp_path)
    assert files.verdict == "passed"
    assert (replay.verdict, replay.reason) == ("not-run", NO_TORCH)


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    """A misspelt folder does not pass."""
    with pytest.raises(UsageError, match="no such folder"):
        verify_folder(tmp_path / "typo")
