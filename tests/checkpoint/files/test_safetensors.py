from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from mtl_export.checkpoint.files.safetensors import open_safetensors, write_safetensors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import CheckpointError
from tests.checkpoint.messages import assert_whole

ARRAYS: dict[str, Array] = {
    "weight": np.arange(15, dtype=np.float32).reshape(3, 5),
    "scale": np.array(2.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "half": np.array([1.5, -2.0, 3.0]).astype(NUMPY_DTYPES["BF16"]),
    "ids": np.array([[7, -9]]),
    "mask": np.array([True, False, True]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with one tensor of each kind."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(ARRAYS, {"format": "pt"}))
    return path


def test_names_dtypes_shapes_and_values_are_those_stored(file: Path) -> None:
    """Every tensor comes back with its dtype, shape and bits, scalars and empties too."""
    opened = open_safetensors(file)
    assert opened.metadata == {"format": "pt"}
    assert opened.tensors.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        tensor = opened.tensors[name]
        found = tensor.numpy()
        assert NUMPY_DTYPES[tensor.dtype] == expected.dtype == found.dtype
        assert tensor.shape == expected.shape == found.shape
        assert found.tobytes() == expected.tobytes()


def test_offsets_point_at_the_bytes(file: Path) -> None:
    """Offsets count from the start of the file, tensors are in file order."""
    opened = open_safetensors(file)
    content = file.read_bytes()
    for name, offset in opened.offsets_bytes.items():
        assert content[offset : offset + ARRAYS[name].nbytes] == ARRAYS[name].tobytes()
    assert list(opened.offsets_bytes.values()) == sorted(opened.offsets_bytes.values())


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    """The metadata block may be absent."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"x": np.ones(2, np.float32)}))
    assert open_safetensors(path).metadata == {}


@given(cut=st.integers(1, 400))
def test_a_truncated_file_is_refused_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """However many bytes are missing, the file is refused before a tensor is read."""
    whole = save(ARRAYS, {"format": "pt"})
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(whole[: -min(cut, len(whole))])
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(path)
    assert_whole(caught.value, where=str(path), found="not a whole safetensors file")


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Text, noise and an empty file are no safetensors."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(path)
    assert_whole(caught.value, where=str(path), found="not a whole safetensors file")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there is an error of the checkpoint, not a traceback."""
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(tmp_path / "gone.safetensors")
    assert_whole(caught.value, where="gone.safetensors", found="no such file")


def test_a_dtype_that_no_model_uses_is_refused_by_tensor(tmp_path: Path) -> None:
    """An unsigned 64-bit tensor is refused with its name and the dtypes that are read."""
    header = {"counter": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}
    encoded = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\x00" * 8)
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(path)
    assert_whole(caught.value, where="'counter'", found="U64", expected="BF16")


def test_written_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """A checkpoint written by one user can be deployed by another."""
    path = tmp_path / "x.safetensors"
    before = os.umask(0o022)
    try:
        write_safetensors(path, {"x": np.arange(3.0)}, {"format": "pt"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    file = open_safetensors(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors["x"].numpy().tolist() == [0.0, 1.0, 2.0]
