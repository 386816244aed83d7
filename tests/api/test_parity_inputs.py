"""The batches that ``parity`` compares on, from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.api.parity_inputs import cases_of
from mtl_export.errors import CalibrationError, UsageError
from tests.graph import marked

SHAPE = (3, 8, 6)


@pytest.fixture
def vision() -> BoundModel:
    """Return a model of three tasks that takes images."""
    bound = marked.bound()
    config = {"image_size": [SHAPE[1], SHAPE[2]], "num_channels": 3}
    return replace(bound, base=replace(bound.base, config=MappingProxyType(config)))


def write(path: Path, shape: tuple[int, ...], ids: list[int]) -> Path:
    """Write images and task ids."""
    pixels = np.random.default_rng(0).normal(size=(len(ids), *shape))
    np.savez(path, pixel_values=pixels, task_ids=np.array(ids), labels=np.zeros(len(ids), int))
    return path


def test_images_come_from_an_npz_file(vision: BoundModel, tmp_path: Path) -> None:
    """In float32, every task alone and mixed; labels are no input."""
    path = write(tmp_path / "images.npz", SHAPE, [0, 1, 2, 2, 1])
    cases = {case.name: case for case in cases_of(vision, path)}
    with np.load(path) as stored:
        pixels = stored["pixel_values"].astype(np.float32)
    assert cases["task 1"].inputs["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(cases["task 1"].inputs["pixel_values"], pixels[[1, 4]])
    assert set(cases["mixed tasks"].inputs) == {"pixel_values", "task_ids"}


def test_what_the_model_does_not_take_is_refused(vision: BoundModel, tmp_path: Path) -> None:
    """Another size, no images at all, rows of text, or a task that does not exist."""
    for shape, found in (((3, 8, 8), "pixel_values [3, 3, 8, 8]"), ((8, 6), "pixel_values [3,")):
        with pytest.raises(UsageError) as caught:
            cases_of(vision, write(tmp_path / "images.npz", shape, [0, 1, 2]))
        assert found in caught.value.problem
        assert caught.value.expected.partition(", because ")[0] == "pixel_values [N, 3, 8, 6]"
    np.savez(tmp_path / "none.npz", task_ids=np.arange(3))
    with pytest.raises(UsageError, match="no pixel_values"):
        cases_of(vision, tmp_path / "none.npz")
    with pytest.raises(UsageError, match=r"arrays\.npz with pixel_values"):
        cases_of(vision, tmp_path / "rows.jsonl")
    with pytest.raises(CalibrationError, match="task ids"):
        cases_of(vision, write(tmp_path / "images.npz", SHAPE, [0, 1, 9]))
