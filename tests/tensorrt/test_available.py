"""Which TensorRT builds here, what is said when none can, and what the log keeps."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mtl_export.errors import BackendMissingError
from mtl_export.tensorrt import available, available_builder
from mtl_export.tensorrt.api import load_library
from mtl_export.tensorrt.available import Gpu, rtx_capabilities, why_not_runnable

NO_GPU = Gpu("", "there is no NVIDIA driver")


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make ``names`` look uninstalled."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def with_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """Let the driver answer with ``gpu``."""
    monkeypatch.setattr(available, "find_gpu", lambda: gpu)


@pytest.fixture
def rtx() -> str:
    """Return the name of the library that builds anywhere, if it is installed."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    return "tensorrt_rtx"


def test_nothing_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages are named, and the one that works anywhere is offered."""
    without(monkeypatch, "tensorrt", "tensorrt_rtx")
    with pytest.raises(BackendMissingError) as refusal:
        available_builder()
    assert refusal.value.fix == "pip install tensorrt_rtx_cu13"
    assert "tensorrt" in refusal.value.problem
    assert "tensorrt_rtx" in refusal.value.problem


def test_asking_for_an_absent_library_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full library has its own command."""
    without(monkeypatch, "tensorrt")
    with pytest.raises(BackendMissingError, match="tensorrt to be importable") as refusal:
        available_builder("tensorrt")
    assert refusal.value.fix == "pip install 'tensorrt>=10.13'"


def test_library_that_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bindings without their shared libraries fail on import, not on install."""
    without(monkeypatch, "tensorrt_rtx")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open')")
    with pytest.raises(BackendMissingError) as refusal:
        available_builder()
    assert "tensorrt is installed but cannot be loaded" in refusal.value.problem
    assert "libnvinfer.so.11" in refusal.value.problem


def test_without_a_gpu_rtx_builds_and_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, rtx: str
) -> None:
    """The reason is the driver's."""
    with_gpu(monkeypatch, NO_GPU)
    info = available_builder()
    assert (info.name, info.can_run, info.reason) == (rtx, False, NO_GPU.problem)
    assert info.version == load_library(rtx).version


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", "the GPU has compute capability 9.0, the engine runs on 8.0, 8.6"),
        ("10.0", "the GPU has compute capability 10.0"),
        ("8.9", "has no CUDA"),
        ("13.0", "has no CUDA"),
    ],
)
def test_gpu_must_be_one_the_engine_is_for(
    monkeypatch: pytest.MonkeyPatch, rtx: str, capability: str, reason: str
) -> None:
    """RTX engines run from 8.0 on but not on 9.0 and 10.x; later GPUs are open."""
    with_gpu(monkeypatch, Gpu(capability, ""))
    monkeypatch.setattr(available, "version", lambda package: "2.13.0+cpu")
    assert reason in why_not_runnable(load_library(rtx), ())


def test_engine_for_one_gpu_runs_on_no_other(monkeypatch: pytest.MonkeyPatch, rtx: str) -> None:
    """Targets are taken at their word."""
    with_gpu(monkeypatch, Gpu("8.9", ""))
    monkeypatch.setattr(available, "version", lambda package: "2.13.0")
    assert "the engine runs on 8.6" in why_not_runnable(load_library(rtx), ("8.6",))
    assert why_not_runnable(load_library(rtx), ("8.6", "8.9")) == ""


def test_targets_of_rtx_are_listed_in_order(rtx: str) -> None:
    """As the library declares them; Hopper is not among them."""
    targets = rtx_capabilities(load_library(rtx).trt)
    assert targets[:4] == ("7.5", "8.0", "8.6", "8.9")
    assert "9.0" not in targets
    assert rtx_capabilities(ModuleType("tensorrt")) == ()


def test_log_keeps_the_cause_and_drops_the_echo(monkeypatch: pytest.MonkeyPatch, rtx: str) -> None:
    """A bad profile is logged twice and followed by a bogus CUDA error; one line is left."""
    library = load_library(rtx)
    trt = library.trt
    with library.log.collect() as errors:
        builder = trt.Builder(library.log.handle)
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (2,), (1,), (3,))
        config = builder.create_builder_config()
        assert config.add_optimization_profile(profile) == -1
    assert any("MIN<=OPT<=MAX" in error for error in errors)
    assert not any("catchCudaError" in error for error in errors)
    with library.log.collect() as later:
        pass
    assert later == []


def test_library_has_one_log(rtx: str) -> None:
    """TensorRT ignores every logger but the first of the process."""
    assert load_library(rtx).log is load_library(rtx).log
    assert load_library(rtx).is_rtx
