"""Real engines, built on the CPU by TensorRT-RTX: what they are, and their options."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_export.tensorrt import (
    BuildOptions,
    EngineManifest,
    api,
    build_engine,
    default_profile,
    manifest_path,
)
from mtl_export.tensorrt.header import read_header
from tests.tensorrt.models import (
    RTX,
    TASKS,
    build_rtx,
    merged_and_nothing_new,
    names_in,
    write_merged,
    write_routed,
)

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_routed_graph_becomes_an_engine(tmp_path: Path, dtype: str, external: bool) -> None:
    """Guarded gather, local function, half and single precision, weights in or out."""
    path = write_routed(tmp_path / "onnx", dtype=dtype, external=external)
    engine = tmp_path / "engines" / "model.engine"
    manifest = build_rtx(path, engine)
    assert names_in(engine.parent) == ["model.engine"]
    assert manifest.engine_size_bytes == engine.stat().st_size
    assert manifest.engine_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert manifest.precision == (dtype,)
    assert (manifest.builder, manifest.tf32) == (RTX, False)
    assert manifest.layout == "single-graph"
    assert [task["name"] for task in manifest.tasks] == list(TASKS)
    assert [str(tensor) for tensor in manifest.inputs] == [
        "int64 input_ids[batch, sequence]",
        "int64 task_ids[batch]",
    ]
    assert sorted(manifest.source_sha256) == names_in(path.parent)
    assert manifest.provenance["base_sha256"] == "0" * 64


def test_checks_without_a_gpu_pass_and_the_others_say_why_not(tmp_path: Path) -> None:
    """What could not be looked at is listed, never left out and never passed."""
    manifest = build_rtx(write_merged(tmp_path), tmp_path / "model.engine")
    verdicts = {check.check: check for check in manifest.validated}
    assert [check.verdict for check in manifest.validated] == ["passed"] * 5 + ["not-run"] * 2
    assert verdicts["its outputs equal the graph's"].reason
    assert all(check.reason == "" for check in manifest.validated if check.verdict == "passed")


def test_same_graph_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    """Twice here, from another folder, watched, and in another process: one engine."""
    first = build_rtx(write_routed(tmp_path / "a"), tmp_path / "1" / "model.engine")
    second = build_rtx(
        write_routed(tmp_path / "b"),
        tmp_path / "2" / "model.engine",
        progress=lambda phase, fraction: None,
    )
    assert first == second
    program = (
        "import sys; from pathlib import Path; from mtl_export.tensorrt import *\n"
        "graph, engine = map(Path, sys.argv[1:])\n"
        "profile = default_profile(graph, max_batch=4, max_sequence=16)\n"
        f"m = build_engine(graph, engine, BuildOptions([profile]), library_name={RTX!r})\n"
        "m.write(manifest_path(engine))"
    )
    engine = tmp_path / "3" / "model.engine"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a" / "model.onnx"), str(engine)],
        check=True,
        capture_output=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert EngineManifest.read(manifest_path(engine)) == first
    first.write(manifest_path(tmp_path / "1" / "model.engine"))
    assert manifest_path(engine).read_bytes() == (tmp_path / "1/model.engine.json").read_bytes()


def test_engine_holds_no_path(tmp_path: Path) -> None:
    """Nothing in the file tells where it was built."""
    build_rtx(write_routed(tmp_path), tmp_path / "model.engine")
    assert str(tmp_path).encode() not in (tmp_path / "model.engine").read_bytes()


def test_tf32_is_off_unless_asked(tmp_path: Path) -> None:
    """The switch reaches the builder: float32 engines differ."""
    path = write_merged(tmp_path)
    exact = build_rtx(path, tmp_path / "exact.engine")
    rounded = build_rtx(path, tmp_path / "rounded.engine", tf32=True)
    assert (exact.tf32, rounded.tf32) == (False, True)
    assert exact.engine_sha256 != rounded.engine_sha256


def test_targets_are_those_asked_for(tmp_path: Path) -> None:
    """The header's targets are checked against the request and reported."""
    path = write_merged(tmp_path)
    manifest = build_rtx(path, tmp_path / "model.engine", compute_capabilities=["12.0", "8.6"])
    assert manifest.targets == ("8.6", "12.0")
    assert manifest.options == {"compute_capabilities": ["12.0", "8.6"]}
    header = read_header(tmp_path / "model.engine")
    assert header is not None
    assert header.version == manifest.builder_version
    assert set(header.parts) == {"ENGN", "WGHT"}


def test_options_reach_the_manifest(tmp_path: Path) -> None:
    """Workspace and optimization level, and several profiles."""
    path = write_merged(tmp_path)
    profiles = [default_profile(path, max_batch=1), default_profile(path, max_batch=8)]
    manifest = build_engine(
        path,
        tmp_path / "model.engine",
        BuildOptions(profiles, workspace_bytes=1 << 28, optimization_level=1),
        library_name=RTX,
    )
    assert manifest.options == {"workspace_bytes": 1 << 28, "optimization_level": 1}
    assert manifest.profiles == tuple(profiles)


def test_progress_rises_to_one(tmp_path: Path) -> None:
    """Phases have names, and the fraction never falls."""
    seen: list[tuple[str, float]] = []
    build_rtx(
        write_merged(tmp_path),
        tmp_path / "model.engine",
        progress=lambda phase, fraction: seen.append((phase, fraction)),
    )
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5
    assert fractions[-1] == 1.0
    assert all(phase for phase, _ in seen)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ZeroDivisionError, BrokenPipeError])
def test_exception_in_progress_stops_the_build(
    tmp_path: Path, problem: type[BaseException]
) -> None:
    """Ctrl-C inside a build arrives, and nothing is left behind."""

    def stop(phase: str, fraction: float) -> None:
        raise problem

    with merged_and_nothing_new(tmp_path) as path, pytest.raises(problem):
        build_rtx(path, tmp_path / "model.engine", progress=stop)


def test_ctrl_c_that_meets_the_logger_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would raise it in the callback at work, and TensorRT would print it and go on."""
    met: list[str] = []

    def log(level: int, text: str, message: str) -> None:
        met.append(message)
        if len(met) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(api._LOGGER, "log", log)
    # As a program starts; test runners' workers ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with merged_and_nothing_new(tmp_path) as path, pytest.raises(KeyboardInterrupt):
            build_rtx(path, tmp_path / "model.engine")
        assert len(met) >= 3
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
