"""Which graphs share a structure, and in which weights those differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.tensorrt.differences import differing_weights, refit_key
from tests.tensorrt.models import write_merged

WEIGHTS = ("dense.bias", "dense.weight", "embeddings", "head.weight")


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tasks_share_a_structure(tmp_path: Path, dtype: str, external: bool) -> None:
    """Weights, name and metadata are no part of it."""
    paths = [
        write_merged(tmp_path / task, seed=seed, task=task, dtype=dtype, external=external)
        for seed, task in enumerate(("ads_rel", "spam"))
    ]
    assert len({refit_key(path) for path in paths}) == 1
    assert differing_weights(paths) == dict.fromkeys(paths, WEIGHTS)


@pytest.mark.parametrize("external", [True, False])
def test_another_structure_is_not_mistaken_for_the_first(tmp_path: Path, external: bool) -> None:
    """A constant that shapes the graph differs, even where only its bytes in the data file do."""
    mean = write_merged(tmp_path / "mean", external=external)
    other = write_merged(tmp_path / "other", external=external, pool_axis=-2)
    assert refit_key(mean) != refit_key(other)
    assert differing_weights([mean, other]) == {mean: (), other: ()}


def test_data_that_folders_share_by_hard_links_is_read(tmp_path: Path) -> None:
    """Also the integers that shape the graph, which lie in the same file."""
    path, copy = write_merged(tmp_path / "model"), tmp_path / "copy" / "model.onnx"
    copy.parent.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (copy.parent / name).hardlink_to(path.parent / name)
    assert refit_key(copy) == refit_key(path)
    assert differing_weights([path, copy]) == {path: (), copy: ()}
