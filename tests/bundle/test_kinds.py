"""What a folder of each command must at least hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.bundle.kinds import unlike_its_kind
from mtl_export.bundle.manifest import Recipe, write_manifest
from mtl_export.bundle.verify import verify_folder
from tests.bundle.test_verify import MERGED, RECIPE, SOURCES

BUILT = Recipe("trt", {}, SOURCES, "0")
LACKING: dict[str, tuple[Recipe, tuple[str, ...], str]] = {
    "no file": (RECIPE, (), "lists no config.json, which onnx writes"),
    "no graph": (RECIPE, ("config.json", "x.data"), "lists no *.onnx, "),
    "no weights of a graph": (RECIPE, ("config.json", "model.onnx"), "lists no *.data, "),
    "half a language model": (
        RECIPE, ("config.json", "prefill.onnx", "x.data"), "lists no decode.onnx, ",
    ),
    "no weights": (MERGED, ("config.json", "merge-report.json"), "lists no *.safetensors, "),
    "no config": (MERGED, ("merge-report.json", "model.safetensors"), "lists no config.json, "),
    "no report of ranges": (
        Recipe("calibrate", {}, SOURCES, "0"), ("config.json", "model.onnx", "model.onnx.data"),
        "lists no calibration.json, ",
    ),
    "no engine": (BUILT, ("x.engine.json",), "lists no *.engine, "),
    "no word on an engine": (
        BUILT, ("a.engine", "b.engine", "a.engine.json"),
        "lists no b.engine.json, ",
    ),
    "no checkpoint": (
        Recipe("inspect", {}, SOURCES, "0"), ("adapter_config.json",), "lists no *.safetensors, ",
    ),
    "no sources": (
        Recipe("trt", {}, {}, "0"), ("a.engine", "a.engine.json"),
        "has no SHA-256 under sources, base_sha256",
    ),
    "a source that is none": (
        Recipe("trt", {}, {**SOURCES, "onnx_sha256 x": "ab"}, "0"), ("a.engine", "a.engine.json"),
        "has no SHA-256 under sources, onnx_sha256 x",
    ),
    "another command": (Recipe("typo", {}, SOURCES, "0"), ("x",), "the command 'typo'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LACKING)
def test_less_than_the_command_writes_fails(tmp_path: Path, fault: str) -> None:
    """A manifest with few files or sources, written as it should be, is no finished folder."""
    recipe, names, reason = LACKING[fault]
    for name in names:
        (tmp_path / name).touch()
    manifest = write_manifest(tmp_path, recipe)
    assert any(reason in problem for problem in unlike_its_kind(manifest))
    files, *_ = verify_folder(tmp_path)
    assert files.verdict == "failed"
    assert reason in files.reason
