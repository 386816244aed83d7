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

from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.checkpoint.torch_pickle import (
    ALLOWED_GLOBALS,
    UNKNOWN,
    imported_globals,
    load_state_dict,
    refuse_code,
)
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


def test_names_from_the_memo_are_followed(tmp_path: Path) -> None:
    """A module name that is fetched from the memo is not mistaken for the last string."""
    path = tmp_path / "a.pkl"
    # Protocol 4 stores "collections" once; the second import takes it from the memo.
    path.write_bytes(pickle.dumps([OrderedDict, __import__("collections").Counter], protocol=4))
    assert imported_globals(path) == {"collections OrderedDict", "collections Counter"}
    # An attacker can leave harmless strings on the stack below the ones that count.
    hidden = (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94"
        b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v20" + b"0h\x00h\x01\x93."
    )
    path.write_bytes(hidden)
    assert "os system" in imported_globals(path)
    assert not imported_globals(path) <= ALLOWED_GLOBALS


@pytest.mark.parametrize(
    "opcodes",
    [b"\x80\x04N\x8c\x06system\x93.", b"\x82\x01.", b"\x80\x04\x93.", b"\x80\x04h\x05h\x06\x93."],
    ids=["built name", "extension", "nothing pushed", "unknown memo"],
)
def test_an_import_that_cannot_be_read_is_reported(tmp_path: Path, opcodes: bytes) -> None:
    """Where the text does not tell the target, it counts as foreign."""
    path = tmp_path / "a.pkl"
    path.write_bytes(opcodes)
    assert imported_globals(path) == {UNKNOWN}
    with pytest.raises(IntegrityError):
        refuse_code(path)


def test_code_before_a_broken_opcode_is_still_found(tmp_path: Path) -> None:
    """A pickle that breaks off after its import has imported all the same."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"cposix\nsystem\n\xff\xff")
    assert imported_globals(path) == {"posix system"}


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100])
def test_what_is_no_pickle_imports_nothing(tmp_path: Path, content: bytes) -> None:
    """Bytes that are no pickle ask for nothing, and are refused when loaded."""
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    assert imported_globals(path) == frozenset()
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert_whole(caught.value, where=str(path), found="torch.load cannot read it")


def test_tensor_bytes_of_a_legacy_file_are_no_opcodes(tmp_path: Path) -> None:
    """Raw storage that spells an import is data: only the pickles before it are read."""
    path = tmp_path / "a.bin"
    text = b"cposix\nsystem\n" * 8
    torch.save(
        {"x": torch.tensor(list(text), dtype=torch.uint8)}, path,
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert text in path.read_bytes()
    assert imported_globals(path) <= ALLOWED_GLOBALS


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    """A torch.save file that lost its tail is refused with what torch says."""
    buffer = io.BytesIO()
    torch.save(state_dict(), buffer)
    path = tmp_path / "a.pt"
    path.write_bytes(buffer.getvalue()[:-200])
    assert not zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert_whole(caught.value, where=str(path), found="torch.load", expected="whole file")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(2)], "'' is a list"),
        ({"a": torch.ones(2), "step": 3}, "'step' is a int"),
        ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
        ({1: torch.ones(2)}, "1 is a torch.float32"),
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
