"""T engines from one structure: equal to plain builds, one graph part, none lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.runtime.tensorrt import Profile, TaskEngine, build_engine, build_task_engines
from mtl_export.runtime.tensorrt import task_engines as module
from tests.runtime.tensorrt_models import TASKS, write_merged

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

RTX = "tensorrt_rtx"
PROFILE = Profile({"input_ids": ((1, 1), (2, 8), (4, 16))})


def built(paths: dict[str, Path], folder: Path) -> list[TaskEngine]:
    """Return what became of every task."""
    engines = {task: folder / f"{task}.engine" for task in paths}
    return list(build_task_engines(paths, engines, profiles=[PROFILE], library_name=RTX))


def plain_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that fills with the graphs that are built without the shared structure."""
    seen: list[Path] = []

    def counting(onnx_path: Path, *args: object, **options: object) -> object:
        seen.append(onnx_path)
        return build_engine(onnx_path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "build_engine", counting)
    return seen


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fed_engines_equal_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, external: bool
) -> None:
    """Byte for byte, manifest included; they differ in weights and share the graph part."""
    paths = {
        task: write_merged(tmp_path / task, seed=seed, task=task, dtype=dtype, external=external)
        for seed, task in enumerate(TASKS)
    }
    plain = plain_builds(monkeypatch)
    fed = built(paths, tmp_path)
    assert plain == []
    assert [engine.task for engine in fed] == list(TASKS)
    manifests = [engine.manifest for engine in fed if engine.manifest]
    for engine, manifest in zip(fed, manifests, strict=True):
        other = tmp_path / "plain" / f"{engine.task}.engine"
        options = {"profiles": [PROFILE], "library_name": RTX}
        assert build_engine(paths[engine.task], other, **options) == manifest  # type: ignore[arg-type]
        assert engine.engine_path.read_bytes() == other.read_bytes()
        assert manifest.tasks[0]["name"] == engine.task
    assert len({manifest.engine_sha256 for manifest in manifests}) == len(TASKS)
    assert len({manifest.graph_sha256 for manifest in manifests}) == 1
    assert "" not in {manifest.graph_sha256 for manifest in manifests}


def test_broken_task_does_not_lose_the_others(tmp_path: Path) -> None:
    """Its error is its result."""
    paths = {task: write_merged(tmp_path / task, task=task) for task in TASKS}
    (tmp_path / TASKS[1] / "model.onnx.data").unlink()
    first, second, third = built(paths, tmp_path)
    assert first.manifest is not None
    assert third.manifest is not None
    assert second.manifest is None
    assert "model.onnx.data is missing" in str(second.error)
    assert not second.engine_path.exists()


def test_broken_first_task_does_not_lose_the_structure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next task that can be read gives it."""
    paths = {task: write_merged(tmp_path / task, task=task) for task in TASKS}
    paths[TASKS[0]].write_bytes(b"")
    plain = plain_builds(monkeypatch)
    assert [engine.error is None for engine in built(paths, tmp_path)] == [False, True, True]
    assert plain == []


@pytest.mark.parametrize("external", [True, False])
def test_other_structure_is_built_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    """A constant that shapes the graph differs, even where only its bytes in the data file do."""
    paths = {
        "mean": write_merged(tmp_path / "mean", external=external),
        "other": write_merged(tmp_path / "other", external=external, pool_axis=-2),
    }
    plain = plain_builds(monkeypatch)
    assert all(engine.manifest for engine in built(paths, tmp_path))
    assert plain == [paths["other"]]
