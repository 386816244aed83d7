"""Engines without weights get back the ones they were built with, and no others.

The library is a stand-in (``fake_tensorrt``), because this needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mtl_export.errors import EngineBuildError, IntegrityError
from mtl_export.tensorrt import (
    BuildOptions,
    TensorRTBackend,
    build_engine,
    default_profile,
    manifest_path,
)
from mtl_export.tensorrt.restore import RESTORED, restore_weights
from tests.tensorrt import fake_tensorrt
from tests.tensorrt.fake_tensorrt import FakeEngine, FakeTensorRT
from tests.tensorrt.models import names_in, write_merged


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Return the library that builds in this test."""
    library = FakeTensorRT()
    fake_tensorrt.install(monkeypatch, library)
    return library


def stripped(folder: Path, *, strip_weights: bool = True) -> tuple[Path, Path]:
    """Return a graph and its engine, by default without its weights."""
    path, engine = write_merged(folder / "onnx"), folder / "small.engine"
    options = BuildOptions(profiles=(default_profile(path),), strip_weights=strip_weights)
    manifest = build_engine(path, engine, options)
    manifest.write(manifest_path(engine))
    return path, engine


def test_the_whole_engine_has_the_graphs_weights(trt: FakeTensorRT, tmp_path: Path) -> None:
    """Its manifest is the stripped one's, but for file, option and one more check."""
    path, small = stripped(tmp_path)
    whole = tmp_path / "whole.engine"
    manifest = restore_weights(small, path, whole)
    found, before = (FakeEngine(trt, None, file.read_bytes()).model for file in (whole, small))
    expected = onnx.load(path)
    assert [one.raw_data for one in found.graph.initializer] == [
        one.raw_data for one in expected.graph.initializer
    ]
    assert not any(any(one.raw_data) for one in before.graph.initializer)
    assert (manifest.engine, manifest.options) == ("whole.engine", {})
    assert manifest.engine_size_bytes == whole.stat().st_size
    assert RESTORED in [check.check for check in manifest.validated]
    assert names_in(tmp_path) == ["onnx", "small.engine", "small.engine.json", "whole.engine"]


def test_an_engine_without_weights_is_not_run(
    trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity and bench say why."""
    _, small = stripped(tmp_path)
    runner = "mtl_export.tensorrt.runner"
    library = fake_tensorrt.install(monkeypatch, trt)
    monkeypatch.setattr(f"{runner}.load_library", lambda name: library)
    assert "its weights were left out" in TensorRTBackend(small).why_not_runnable()


@pytest.mark.parametrize("what", ["graph", "engine", "whole"])
def test_other_files_are_refused(trt: FakeTensorRT, tmp_path: Path, what: str) -> None:
    """Another graph's weights, a changed engine, an engine that has its weights."""
    path, small = stripped(tmp_path, strip_weights=what != "whole")
    messages = {"graph": "is not the graph", "engine": "not the one", "whole": "has its weights"}
    if what == "graph":
        path = write_merged(tmp_path / "other", seed=1)
    if what == "engine":
        small.write_bytes(small.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match=messages[what]):
        restore_weights(small, path, tmp_path / "whole.engine")
    assert not (tmp_path / "whole.engine").exists()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"fails": {"refit_from_file"}}, "refit_from_file is out of order"),
        ({"fails": {"refit_cuda_engine"}}, "refit_cuda_engine is out of order"),
        ({"unnamed": "val_61"}, "val_61 are not in the graph"),
    ],
)
def test_refusals_of_the_library_leave_no_engine(
    trt: FakeTensorRT, tmp_path: Path, faults: dict[str, object], message: str
) -> None:
    """Calls that only log, and weights that the engine lacks afterwards."""
    path, small = stripped(tmp_path)
    for name, value in faults.items():
        setattr(trt.faults, name, value)
    with pytest.raises(EngineBuildError, match=message):
        restore_weights(small, path, tmp_path / "whole.engine")
    assert names_in(tmp_path) == ["onnx", "small.engine", "small.engine.json"]
