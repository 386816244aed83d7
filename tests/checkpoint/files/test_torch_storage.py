from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.checkpoint.files.torch_pickle import load_pickle, load_state_dict
from mtl_export.errors import CheckpointError, IntegrityError, MtlExportError
from tests.checkpoint.messages import assert_whole

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def save(content: object, path: Path, container: str) -> Path:
    """Write ``content`` with torch, in the container named."""
    torch.save(content, path, _use_new_zipfile_serialization=container != "stream")
    if container == "deflated":
        rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    return path


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> None:
    """Write the zip file again with members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def bits(values: torch.Tensor) -> bytes:
    """Return the row-major bytes of a tensor."""
    dense = values.detach().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def assert_as_torch(path: Path) -> None:
    """Check dtype, shape and every bit of a state dict against torch."""
    expected = torch.load(path, weights_only=True)
    found = load_state_dict(path)
    assert list(found) == list(expected)
    for name, value in expected.items():
        values = found[name].numpy()
        assert found[name].shape == values.shape == tuple(value.shape), name
        assert values.dtype.name == str(value.dtype).removeprefix("torch."), name
        assert values.flags.c_contiguous
        assert values.flags.writeable
        assert values.tobytes() == bits(value), name


@pytest.mark.parametrize(
    ("dtype", "container"),
    [
        (dtype, container)
        for dtype in DTYPES
        for container in ("zip", "stream", "deflated")
        if dtype.itemsize > 1 or container != "stream" or "float8" not in str(dtype)
    ],  # torch cannot write float8 into a stream
    ids=str,
)
def test_every_dtype_is_what_torch_reads(
    tmp_path: Path, dtype: torch.dtype, container: str
) -> None:
    """Views of one storage, transposed, stepped, repeated, empty and of rank 0, bit by bit."""
    whole = torch.arange(60).remainder(2 if dtype == torch.bool else 100).to(dtype).reshape(3, 4, 5)
    state = {
        "whole": whole,
        "tail": whole[1:],
        "transposed": whole.transpose(0, 2),
        "stepped": whole[:, 1::2, ::3],
        "scalar": whole[2, 1, 4],
        "repeated": whole[0, 0, :1].expand(7, 1).expand(2, 7, 1),
        "empty": whole[:, :0],
        "alone": torch.empty(0, dtype=dtype),
        "parameter": torch.nn.Parameter(whole[0].clone(), requires_grad=False),
    }
    assert_as_torch(save(state, tmp_path / "a.bin", container))


def test_what_a_parameter_carries_besides_is_left_out(tmp_path: Path) -> None:
    """A parameter with Python attributes and a module's metadata are read for their values."""
    layer = torch.nn.Linear(3, 2)
    layer.weight.__dict__["ds_id"] = 5
    state = dict(layer.named_parameters())
    assert_as_torch(save(state, tmp_path / "a.bin", "zip"))
    assert_as_torch(save(layer.state_dict(), tmp_path / "b.bin", "stream"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    """torch.save takes a protocol; the values do not depend on it."""
    state = {"a" * 300: torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    found = load_state_dict(tmp_path / "a.bin")
    assert {name: tensor.numpy().tolist() for name, tensor in found.items()} == {
        name: value.tolist() for name, value in state.items()
    }


def test_plain_values_beside_tensors_come_back(tmp_path: Path) -> None:
    """Numbers, texts, lists, sets and nested dictionaries are what they were."""
    plain = {"a": [1, -2, 2**40, 2.5, None, True], "b": ({"x": "é"}, {"u", "v"}), 3: b"", "": ""}
    path = tmp_path / "a.pt"
    torch.save({"plain": plain, "model": {"w": torch.ones(2)}}, path, pickle_protocol=4)
    loaded = load_pickle(path)
    assert loaded["plain"] == plain
    assert loaded["model"]["w"].numpy().tolist() == [1, 1]


def test_a_part_of_a_storage_is_read_as_torch_once_wrote_it(tmp_path: Path) -> None:
    """Before torch 0.4 a storage could be a part of another one."""
    path = save({"w": torch.arange(10.0)[2:4]}, tmp_path / "a.bin", "stream")
    plain = path.read_bytes()
    # (..., count, None) -> (..., count, ("part", 3, 5)); memo indices are those torch wrote.
    old = b"K\nNt"
    assert plain.count(old) == 1
    path.write_bytes(plain.replace(old, b"K\nX\x04\x00\x00\x00partK\x03K\x05\x87t"))
    assert load_state_dict(path)["w"].numpy().tolist() == [5, 6]


@pytest.mark.parametrize("container", ["zip", "stream"])
def test_reading_imports_no_torch(tmp_path: Path, container: str) -> None:
    """Importing torch takes seconds; a checkpoint of tensors is read without it."""
    state = {
        "base.q_proj.lora_A.weight": torch.ones(2, 3),
        "base.q_proj.lora_B.weight": torch.ones(4, 2),
    }
    file = save(state, tmp_path / "final_checkpoint.pt", container)
    program = f"""
import sys
from pathlib import Path
from mtl_export.checkpoint.reader import open_checkpoint
checkpoint = open_checkpoint(Path({str(file)!r}), alpha=2.0)
assert checkpoint.family == "lora"
assert sum(t.numpy().sum() for la in checkpoint.layers.values() for t in la.tensors.values()) == 14
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class Call:
    """Pickles as a call of a function that torch has, with arguments torch never gives."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.call = (target, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the call."""
        return self.call


REBUILD = torch._utils._rebuild_tensor_v2
STORAGE = torch.arange(6.0)._typed_storage()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "call",
    [
        Call(REBUILD, STORAGE, 4, (3,), (1,), False, {}),
        Call(REBUILD, STORAGE, 0, (2, 2), (5, 1), False, {}),
        Call(REBUILD, STORAGE, -1, (2,), (1,), False, {}),
        Call(REBUILD, STORAGE, 5, (3,), (-1,), False, {}),
        Call(REBUILD, STORAGE, 0, (2,), (1, 1), False, {}),
        Call(REBUILD, STORAGE, 0, (True,), (1,), False, {}),
        Call(REBUILD, STORAGE, 0, (2.0,), (1,), False, {}),
        Call(REBUILD, STORAGE, 0, (10**12,), (0,), False, {}),
        Call(REBUILD, STORAGE, 0, (2**62, 2**62), (0, 0), False, {}),
        Call(REBUILD, STORAGE, 0, (1,) * 65, (1,) * 65, False, {}),
        Call(REBUILD, STORAGE, 0, (2,), (1,), False, {}, {"neg": True}),
        Call(REBUILD, STORAGE, 0, (2,), (1,), False, {}, None, None, None),
        Call(REBUILD, 7, 0, (2,), (1,), False, {}),
        Call(REBUILD, STORAGE),
        Call(REBUILD),
        Call(torch._utils._rebuild_parameter, "x", True, {}),
        Call(torch._utils._rebuild_parameter),
        Call(torch._utils._rebuild_tensor_v3, STORAGE, 0, (2,), (1,), False, {}, 5),
        Call(set, [(1, 2)]),
        Call(set, 5),
        Call(set, [], []),
    ],
)
def test_a_tensor_that_no_storage_holds_is_refused(tmp_path: Path, call: Call) -> None:
    """Sizes, strides, offsets and arguments that torch never writes read nothing outside."""
    torch.save({"w": call}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(tmp_path / "a.bin")
    assert_whole(caught.value, where="a.bin", found="damaged")


@pytest.mark.parametrize("name", ["data/0", "data.pkl", "byteorder"])
def test_one_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    """A damaged download is a broken checkpoint, wherever the bit is."""
    path = save({"w": torch.arange(6.0)}, tmp_path / "a.bin", "zip")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (member,) = (info for info in archive.infolist() if info.filename.endswith(name))
        start = content.index(archive.read(member), member.header_offset)
    content[start] ^= 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert_whole(caught.value, where="a.bin", found="checksum", expected="whole file")


@pytest.mark.parametrize("container", ["zip", "stream", "deflated"])
def test_every_truncation_is_refused(tmp_path: Path, container: str) -> None:
    """A file cut anywhere is a broken checkpoint."""
    path = save({"w": torch.arange(6.0), "v": torch.ones(2)}, tmp_path / "a.bin", container)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            load_state_dict(path)
        assert_whole(caught.value, where="a.bin", found="damaged")


@pytest.mark.parametrize("container", ["zip", "stream", "deflated"])
def test_changed_bytes_end_in_a_typed_error_or_in_values(tmp_path: Path, container: str) -> None:
    """Whatever byte is changed, nothing but our errors comes out of the reader."""
    path = save({"w": torch.arange(6.0), "v": torch.ones(2)}, tmp_path / "a.bin", container)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(600):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), generator.integers(1, 4)):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        try:
            for tensor in load_state_dict(path).values():
                tensor.numpy()
        except MtlExportError as error:
            assert isinstance(error, CheckpointError | IntegrityError)  # noqa: PT017


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    """Big-endian values are not read as if they were little-endian, in either container."""
    path = save({"w": torch.ones(2)}, tmp_path / "a.bin", "zip")
    rewritten(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        load_state_dict(path)
    path = save({"w": torch.ones(2)}, path, "stream")
    content = path.read_bytes()
    flag = b"little_endian"
    begin = content.index(b"\x88", content.index(flag))
    path.write_bytes(content[:begin] + b"\x89" + content[begin + 1 :])
    with pytest.raises(CheckpointError, match="big-endian"):
        load_state_dict(path)


def test_the_storage_count_of_a_stream_must_agree(tmp_path: Path) -> None:
    """The count before a storage's bytes is that of its tensors."""
    path = save({"w": torch.ones(3)}, tmp_path / "a.bin", "stream")
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<q", 3), struct.pack("<q", 2)))
    with pytest.raises(CheckpointError, match="another size"):
        load_state_dict(path)


def test_a_plain_pickle_is_no_checkpoint(tmp_path: Path) -> None:
    """A pickle that asks for nothing, but that torch did not write, is refused as such."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(CheckpointError, match=r"torch\.save did not write"):
        load_state_dict(path)


def test_a_file_larger_than_its_checksums_are_compared_for_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of a large file are mapped: reading one tensor reads no other."""
    path = save({"w": torch.arange(6.0), "v": torch.ones(1 << 16)}, tmp_path / "a.bin", "zip")
    monkeypatch.setattr("mtl_export.checkpoint.files.torch_pickle.CHECKED_BYTES", 0)
    found = load_state_dict(path)["w"].numpy()
    assert found.tolist() == [0, 1, 2, 3, 4, 5]
    owner: Any = found
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert "mmap" in repr(getattr(owner, "obj", owner))
    assert io.BytesIO(found.tobytes()).read() == np.arange(6, dtype=np.float32).tobytes()
