"""T engines from one structure: equal to plain builds, one graph part, none lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.errors import EngineBuildError
from mtl_export.tensorrt import Profile, build_engine
from mtl_export.tensorrt import structure_cache as module
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.structure_cache import SharedBuilds
from tests.tensorrt.models import TASKS, write_merged

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

RTX = "tensorrt_rtx"
PROFILE = Profile({"input_ids": ((1, 1), (2, 8), (4, 16))})
OPTIONS = BuildOptions(profiles=(PROFILE,))


@pytest.fixture
def structures(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Give a list that fills with the model whose structure each engine is fed to."""
    seen: list[Path] = []
    feed = module.feed

    def noting(parser: object, structure: module.Structure, weights: module.Weights) -> bool:
        seen.append(structure.path)
        return feed(parser, structure, weights)

    monkeypatch.setattr(module, "feed", noting)
    return seen


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fed_engines_equal_plain_ones(
    tmp_path: Path, structures: list[Path], dtype: str, external: bool
) -> None:
    """Byte for byte, manifest included; they differ in weights and share the graph part."""
    paths = {
        task: write_merged(tmp_path / task, seed=seed, task=task, dtype=dtype, external=external)
        for seed, task in enumerate(TASKS)
    }
    builds = SharedBuilds(RTX)
    manifests = []
    for task, path in paths.items():
        fed, plain = tmp_path / f"{task}.engine", tmp_path / "plain" / f"{task}.engine"
        manifest = builds.build(path, fed, options=OPTIONS)
        assert build_engine(path, plain, profiles=[PROFILE], library_name=RTX) == manifest
        assert fed.read_bytes() == plain.read_bytes()
        assert manifest.tasks[0]["name"] == task
        manifests.append(manifest)
    assert structures == [paths[TASKS[0]]] * len(TASKS)
    assert len({manifest.engine_sha256 for manifest in manifests}) == len(TASKS)
    assert len({manifest.graph_sha256 for manifest in manifests}) == 1
    assert "" not in {manifest.graph_sha256 for manifest in manifests}


def test_broken_first_model_does_not_lose_the_structure(
    tmp_path: Path, structures: list[Path]
) -> None:
    """The next one that can be read gives it."""
    paths = [write_merged(tmp_path / task, task=task) for task in TASKS]
    paths[0].write_bytes(b"")
    builds = SharedBuilds(RTX)
    with pytest.raises(EngineBuildError, match="it holds no graph"):
        builds.build(paths[0], tmp_path / "first.engine", options=OPTIONS)
    for path in paths[1:]:
        builds.build(path, path.with_suffix(".engine"), options=OPTIONS)
    assert structures == [paths[1], paths[1]]


@pytest.mark.parametrize("external", [True, False])
def test_another_structure_is_not_mistaken_for_the_first(
    tmp_path: Path, structures: list[Path], external: bool
) -> None:
    """A constant that shapes the graph differs, even where only its bytes in the data file do."""
    mean = write_merged(tmp_path / "mean", external=external)
    other = write_merged(tmp_path / "other", external=external, pool_axis=-2)
    again = write_merged(tmp_path / "again", external=external, seed=1)
    builds = SharedBuilds(RTX)
    for path in (mean, other, again):
        builds.build(path, path.with_suffix(".engine"), options=OPTIONS)
    assert structures == [mean, other, mean]
    plain = tmp_path / "plain.engine"
    build_engine(other, plain, profiles=[PROFILE], library_name=RTX)
    assert other.with_suffix(".engine").read_bytes() == plain.read_bytes()


def test_a_library_that_cannot_be_fed_reads_every_file(
    tmp_path: Path, structures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is the same."""
    path = write_merged(tmp_path)
    fed, plain = tmp_path / "fed.engine", tmp_path / "plain.engine"
    SharedBuilds(RTX).build(path, fed, options=OPTIONS)
    assert structures == [path]
    builds = SharedBuilds(RTX)
    monkeypatch.setattr(builds, "_can_feed", False)
    builds.build(path, plain, options=OPTIONS)
    assert structures == [path]
    assert plain.read_bytes() == fed.read_bytes()


def test_data_that_folders_share_by_hard_links_is_read(
    tmp_path: Path, structures: list[Path]
) -> None:
    """Also the integers that shape the graph, which lie in the same file."""
    path, copy = write_merged(tmp_path / "model"), tmp_path / "copy" / "model.onnx"
    copy.parent.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (copy.parent / name).hardlink_to(path.parent / name)
    manifest = SharedBuilds(RTX).build(copy, tmp_path / "model.engine", options=OPTIONS)
    assert structures == [copy]
    assert manifest.source_sha256
