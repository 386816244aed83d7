"""What only TensorRT with a GPU can do: asked of a stand-in, and refused by TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.errors import EngineBuildError, MtlExportError, OutputError, UsageError
from mtl_export.tensorrt import EngineManifest, default_profile
from mtl_export.tensorrt.api import Library, Log, load_library
from mtl_export.tensorrt.build import build_engine, load_timing_cache, save_timing_cache
from mtl_export.tensorrt.options import RTX_REFUSALS, BuildOptions
from tests.tensorrt import fake_tensorrt
from tests.tensorrt.fake_tensorrt import GPU, FakeTensorRT
from tests.tensorrt.models import write_merged


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Return the library that builds in this test."""
    library = FakeTensorRT()
    fake_tensorrt.install(monkeypatch, library)
    return library


def build(folder: Path, **choices: object) -> EngineManifest:
    """Return the manifest of a merged graph's engine, built with ``choices``."""
    path = write_merged(folder / "onnx")
    profile = default_profile(path, max_batch=4, max_sequence=16)
    options = BuildOptions(profiles=(profile, profile), **choices)  # type: ignore[arg-type]
    return build_engine(path, folder / "model.engine", options)


def test_defaults_ask_for_nothing(trt: FakeTensorRT, tmp_path: Path) -> None:
    """TF32 is switched off, and no other flag is on."""
    assert build(tmp_path).options == {}
    assert trt.given == {
        "flags": set(), "level": 3, "hardware": "NONE", "pools": {}, "profiles": 2,
    }  # fmt: skip


def test_every_choice_reaches_the_builder_and_the_manifest(
    trt: FakeTensorRT, tmp_path: Path
) -> None:
    """The timing cache by its name alone: manifests hold no paths."""
    manifest = build(
        tmp_path,
        tf32=True,
        workspace_bytes=1 << 31,
        optimization_level=5,
        version_compatible=True,
        hardware_compatibility="same-compute-capability",
        timing_cache=tmp_path / "kernels.bin",
        strip_weights=True,
    )
    assert trt.given == {
        "flags": {"TF32", "VERSION_COMPATIBLE", "STRIP_PLAN"},
        "level": 5,
        "hardware": "SAME_COMPUTE_CAPABILITY",
        "pools": {"WORKSPACE": 1 << 31},
        "profiles": 2,
    }
    assert manifest.options == {
        "workspace_bytes": 1 << 31,
        "optimization_level": 5,
        "version_compatible": True,
        "hardware_compatibility": "same-compute-capability",
        "timing_cache": "kernels.bin",
        "strip_weights": True,
    }


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("VERSION_COMPATIBLE", {"version_compatible": True}),
        ("STRIP_PLAN", {"strip_weights": True}),
    ],
)
def test_flag_that_is_only_logged_about_is_an_error(
    trt: FakeTensorRT, tmp_path: Path, flag: str, choices: dict[str, object]
) -> None:
    """``set_flag`` returns None whatever happens."""
    trt.faults.ignored = {flag}
    with pytest.raises(EngineBuildError, match=f"failed: {flag} is not available"):
        build(tmp_path, **choices)
    assert not (tmp_path / "model.engine").exists()


def test_timings_are_kept_from_build_to_build(trt: FakeTensorRT, tmp_path: Path) -> None:
    """The second build times nothing; what another has added meanwhile is kept."""
    cache = tmp_path / "deep" / "kernels.bin"
    build(tmp_path, timing_cache=cache)
    assert trt.timed > 0
    assert sorted(one.name for one in cache.parent.iterdir()) == ["kernels.bin"]
    cache.write_bytes(cache.read_bytes() + b" Softmax")
    build(tmp_path, timing_cache=cache)
    assert trt.timed == 0
    assert set(cache.read_bytes().removeprefix(GPU).split()) == {
        b"Add", b"Gather", b"MatMul", b"ReduceMean", b"Softmax",
    }  # fmt: skip


def test_timings_of_another_gpu_are_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    """Neither used nor overwritten."""
    cache = tmp_path / "kernels.bin"
    cache.write_bytes(b"gpu-1 Add")
    with pytest.raises(UsageError, match="not taken: timing cache of another device"):
        build(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"gpu-1 Add"


def test_file_that_becomes_another_gpus_is_left_alone(trt: FakeTensorRT, tmp_path: Path) -> None:
    """Two machines share a folder: the later one does not lose the other's timings."""
    cache = tmp_path / "kernels.bin"
    library = Library("tensorrt", trt, Log(trt))  # type: ignore[arg-type]
    config = trt.Builder(library.log.handle).create_builder_config()
    load_timing_cache(config, cache, [])
    cache.write_bytes(b"gpu-1 Add")
    with pytest.raises(OutputError, match="became the cache of another GPU"):
        save_timing_cache(config, cache)
    assert cache.read_bytes() == b"gpu-1 Add"


def test_timing_cache_that_is_a_folder_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    """The path is named, before anything is built."""
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        build(tmp_path, timing_cache=tmp_path)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops")
def test_real_library_writes_a_timing_cache(tmp_path: Path) -> None:
    """The calls are those of the bindings; TensorRT-RTX's cache holds no kernels."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    library, cache = load_library("tensorrt_rtx"), tmp_path / "kernels.bin"
    with library.log.collect() as errors:
        config = library.trt.Builder(library.log.handle).create_builder_config()
        load_timing_cache(config, cache, errors)
        save_timing_cache(config, cache)
    assert cache.stat().st_size > 0
    assert errors == []


@pytest.mark.parametrize(
    ("what", "choices"),
    [
        ("version compatibility", {"version_compatible": True}),
        ("hardware compatibility", {"hardware_compatibility": "ampere-plus"}),
        ("timing cache", {"timing_cache": Path("kernels.bin")}),
        ("stripped weights", {"strip_weights": True}),
        ("refit", {"refit": True, "refittable": ("dense.weight",)}),
    ],
)
def test_rtx_refuses_what_it_would_ignore(
    tmp_path: Path, what: str, choices: dict[str, object]
) -> None:
    """Each with its own reason and another way."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    path = write_merged(tmp_path)
    options = BuildOptions(profiles=(default_profile(path),), **choices)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as refusal:
        build_engine(path, tmp_path / "model.engine", options, library_name="tensorrt_rtx")
    assert refusal.value.problem.startswith(what)
    name, why, fix = RTX_REFUSALS[next(iter(choices))]
    assert name == what
    assert refusal.value.expected.endswith(f"because {why}")
    assert refusal.value.fix == fix


def test_full_tensorrt_refuses_other_targets(trt: FakeTensorRT, tmp_path: Path) -> None:
    """It builds for the GPU it finds."""
    with pytest.raises(MtlExportError, match="cannot build for another GPU"):
        build(tmp_path, compute_capabilities=("8.6",))


def test_unknown_hardware_level_is_refused(trt: FakeTensorRT, tmp_path: Path) -> None:
    """The levels are named."""
    with pytest.raises(UsageError, match="one of ampere-plus, same-compute-capability"):
        build(tmp_path, hardware_compatibility="turing-plus")
