"""The engine runner up to the GPU's door: what the host checks, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.errors import BackendMissingError, EngineRunError, IntegrityError
from mtl_export.tensorrt import (
    BuildOptions,
    Profile,
    TensorRTBackend,
    available,
    build_engine,
    manifest_path,
)
from mtl_export.tensorrt.available import Gpu
from tests.tensorrt.models import routed_inputs, write_routed

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

SMALL = Profile({"input_ids": ((1, 1), (1, 4), (1, 8)), "task_ids": ((1,), (1,), (1,))})
LARGE = Profile({"input_ids": ((1, 1), (4, 8), (8, 16)), "task_ids": ((1,), (4,), (8,))})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an engine with its manifest and two profiles."""
    folder = tmp_path_factory.mktemp("engine")
    path = folder / "model.engine"
    manifest = build_engine(
        write_routed(folder), path, BuildOptions([SMALL, LARGE]), library_name="tensorrt_rtx"
    )
    manifest.write(manifest_path(path))
    return path


@pytest.mark.parametrize(
    ("batch", "sequence", "profile"), [(1, 8, 0), (1, 9, 1), (3, 7, 1), (8, 16, 1)]
)
def test_first_profile_that_admits_is_taken(
    engine: Path, batch: int, sequence: int, profile: int
) -> None:
    """In the order in which they were built."""
    assert TensorRTBackend(engine).check_inputs(routed_inputs(batch, sequence)) == profile


def test_shape_outside_every_profile_is_refused(engine: Path) -> None:
    """The given shapes and the ranges are both named."""
    with pytest.raises(EngineRunError) as refusal:
        TensorRTBackend(engine).check_inputs(routed_inputs(9, 7))
    assert "input_ids:9x7,task_ids:9" in refusal.value.problem
    assert "input_ids:8x16,task_ids:8" in refusal.value.expected


@pytest.mark.parametrize("bad", [-1, 3, 2**32 + 1])
def test_unknown_task_ids_never_reach_the_engine(engine: Path, bad: int) -> None:
    """The library would cut them to 32 bits and answer with zeros."""
    inputs = routed_inputs()
    inputs["task_ids"][1] = bad
    with pytest.raises(EngineRunError, match=rf"ids {bad} are outside.*ads_rel, sentiment, spam"):
        TensorRTBackend(engine).infer(inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task_ids", None, "task_ids is missing"),
        ("extra", np.zeros(1), "extra is not an input"),
        ("task_ids", np.zeros(3, np.int32), "task_ids is int32, not int64"),
        ("task_ids", np.zeros((3, 1), np.int64), r"task_ids has shape \[3, 1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    engine: Path, name: str, value: np.ndarray | None, message: str
) -> None:
    """Missing, unknown, of another type, of another rank."""
    inputs: dict[str, np.ndarray] = routed_inputs()
    if value is None:
        del inputs[name]
    else:
        inputs[name] = value
    with pytest.raises(EngineRunError, match=message):
        TensorRTBackend(engine).check_inputs(inputs)


def test_engine_runs_inside_the_block_only(engine: Path) -> None:
    """Nothing is loaded before ``with``."""
    with pytest.raises(EngineRunError, match="not open"):
        TensorRTBackend(engine).infer(routed_inputs())


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (Gpu("", "there is no NVIDIA driver"), "there is no NVIDIA driver"),
        (Gpu("9.0", ""), "the GPU has compute capability 9.0"),
    ],
)
def test_machine_that_cannot_run_it_is_told_why(
    engine: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, reason: str
) -> None:
    """The words that parity reports as ``not-run``."""
    monkeypatch.setattr(available, "find_gpu", lambda: gpu)
    with (
        pytest.raises(BackendMissingError, match=f"not runnable here: {reason}"),
        TensorRTBackend(engine),
    ):
        pytest.fail("the block was entered")


def test_engine_of_another_release_is_not_runnable(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTX engines open in the release that wrote them only."""
    other = tmp_path / "model.engine"
    text = manifest_path(engine).read_text()
    version = TensorRTBackend(engine).manifest.builder_version
    manifest_path(other).write_text(text.replace(f'"version": "{version}"', '"version": "1.6.0.0"'))
    assert "open in that release only" in TensorRTBackend(other).why_not_runnable()


@pytest.mark.parametrize("content", [None, b"another engine"])
def test_engine_that_is_not_its_manifests_is_refused(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Missing or replaced, before anything is loaded."""
    other = tmp_path / "model.engine"
    manifest_path(other).write_text(manifest_path(engine).read_text())
    if content is not None:
        other.write_bytes(content)
    monkeypatch.setattr(TensorRTBackend, "why_not_runnable", lambda self: "")
    with pytest.raises(IntegrityError, match="SHA-256"), TensorRTBackend(other):
        pytest.fail("the block was entered")


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    """An engine alone does not say what it is."""
    with (
        pytest.raises(IntegrityError, match=r"model\.engine\.json"),
        TensorRTBackend(tmp_path / "model.engine"),
    ):
        pytest.fail("the block was entered")
