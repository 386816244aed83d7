from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.checkpoint.files.torch_pickle import (
    load_state_dict,
    refuse_code,
    stored_names,
)
from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.errors import CheckpointError, IntegrityError
from tests.checkpoint.messages import assert_whole

SYSTEM = f"{os.system.__module__} system"


class RunsCode:
    """An object whose unpickling runs a command that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Ask the unpickler to call ``os.system``."""
        return os.system, (f"touch '{self.trace}'",)


def state_dict() -> dict[str, torch.Tensor]:
    """Return tensors of several kinds, one transposed, two sharing storage."""
    weight = torch.arange(15, dtype=torch.float32).reshape(3, 5)
    return OrderedDict(
        weight=weight,
        transposed=weight.t(),
        tail=weight[1:],
        half=torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        single=torch.tensor(2.0, dtype=torch.float16),
        ids=torch.tensor([[7, -9]]),
        mask=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
    )


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_is_read_as_it_was_saved(tmp_path: Path, modern: bool) -> None:
    """Names, dtypes, shapes and values of a torch.save file come back, in both containers."""
    path = tmp_path / "adapter.bin"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=modern)
    refuse_code(path)
    tensors = load_state_dict(path)
    assert list(tensors) == list(state_dict())
    for name, expected in state_dict().items():
        found = tensors[name].numpy()
        assert NUMPY_DTYPES[tensors[name].dtype] == found.dtype
        assert tensors[name].shape == tuple(expected.shape) == found.shape
        np.testing.assert_array_equal(
            found.astype(np.float64), expected.detach().to(torch.float64).numpy()
        )


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_refused_in_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    """A pickle that calls os.system is refused by name and never run."""
    path, trace = tmp_path / "adapter.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"weight": RunsCode(trace)}, protocol=protocol))
    with pytest.raises(IntegrityError) as caught:
        refuse_code(path)
    assert_whole(caught.value, where=str(path), found=SYSTEM, expected="dictionary of tensors")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pickle"])
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_in_every_torch_container(
    tmp_path: Path, suffix: str, modern: bool
) -> None:
    """Code beside tensors is found in zip files and in the fourth pickle of legacy files."""
    path, trace = tmp_path / f"adapter{suffix}", tmp_path / "trace"
    content = {"weight": torch.ones(3), "more": RunsCode(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=modern)
    for refuse in (refuse_code, load_state_dict):
        with pytest.raises(IntegrityError) as caught:
            refuse(path)
        assert_whole(caught.value, where=str(path), found=SYSTEM)
    assert not trace.exists()


def test_a_folder_is_searched_for_pickles(tmp_path: Path) -> None:
    """One bad pickle beside good files refuses the folder; other suffixes are left alone."""
    torch.save(state_dict(), tmp_path / "good.bin")
    refuse_code(tmp_path)
    (tmp_path / "notes.txt").write_bytes(pickle.dumps(RunsCode(tmp_path / "t")))
    refuse_code(tmp_path)
    (tmp_path / "z.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "t")))
    with pytest.raises(IntegrityError, match=r"z\.pt"):
        refuse_code(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100])
def test_what_is_no_pickle_is_damaged(tmp_path: Path, content: bytes) -> None:
    """Bytes that are no pickle ask for nothing, and are refused as damaged."""
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    for read in (load_state_dict, refuse_code, stored_names):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert_whole(caught.value, where=str(path), found="no pickle that torch.save writes")


def test_tensor_bytes_of_a_legacy_file_are_no_opcodes(tmp_path: Path) -> None:
    """Raw storage that spells an import is data: only the pickles before it are read."""
    path = tmp_path / "a.bin"
    text = b"cposix\nsystem\n" * 8
    torch.save(
        {"x": torch.tensor(list(text), dtype=torch.uint8)}, path,
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert text in path.read_bytes()
    assert load_state_dict(path)["x"].numpy().tobytes() == text


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    """A torch.save file that lost its tail is refused as damaged."""
    buffer = io.BytesIO()
    torch.save(state_dict(), buffer)
    path = tmp_path / "a.pt"
    path.write_bytes(buffer.getvalue()[:-200])
    assert not zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert_whole(caught.value, where=str(path), found="damaged", expected="whole file")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(2)], "'' is a list"),
        ({"a": torch.ones(2), "step": 3}, "'step' is a int"),
        ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
        ({1: torch.ones(2)}, "1 is a tensor of F32"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is a torch.complex64"),
    ],
)
def test_other_things_than_named_tensors_are_refused(
    tmp_path: Path, content: object, found: str
) -> None:
    """A list, a nested dictionary, a number or an odd dtype is named."""
    path = tmp_path / "a.pt"
    torch.save(content, path)
    if "complex" in found:
        with pytest.raises(IntegrityError, match="ComplexFloatStorage"):
            load_state_dict(path)
        return
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert_whole(caught.value, where=str(path), found=found, expected="dense tensors")
