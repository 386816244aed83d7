"""A ``torch.save`` file -> its tensors and plain values, without torch and without running it.

Two containers:
    zip       torch's since 1.6: ``data.pkl``, and one member ``data/KEY`` per storage
    stream    before 1.6: five pickles (magic number, protocol, system, object, storage keys),
              then each storage as a count (int64) and its bytes
Both go through one machine, ``restricted_pickle``. torch's third container (a tar) and
TorchScript (a zip with ``constants.pkl`` and ``code/``) are refused.

Values stay on disk. Checksums: a pickle's is always compared, a storage's in files of at most
``CHECKED_BYTES``, since reading a base of many gigabytes for it would take as long as the merge.

Source: ``_load`` and ``_legacy_load`` in
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.restricted_pickle import (
    MAX_PICKLE_BYTES,
    BrokenPickleError,
    unpickled,
)
from mtl_export.checkpoint.files.torch_storage import (
    KNOWN,
    InflatedBytes,
    MappedBytes,
    Storage,
    storage_id,
)
from mtl_export.checkpoint.files.zip_file import ZipMember, damaged, is_zip, open_zip
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Tensor
from mtl_export.errors import CheckpointError, IntegrityError, shortened

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
CHECKED_BYTES = 64 << 20
MAX_INFLATED_BYTES = 512 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_FEW = 1000  # instructions in a header


def refuse_code(path: Path) -> None:
    """Refuse ``path``, or a file in the folder ``path``, if it is a pickle with code in it.

    Raises:
        IntegrityError: A pickle asks for something that a state dict does not need.
        CheckpointError: The file ``path`` is damaged.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in SUFFIXES and file.is_file():
            try:
                load_pickle(file)
            except CheckpointError:
                if file == path:
                    raise


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``torch.save`` file by key; their values stay on disk.

    The file holds one flat dictionary of tensors: a state dict. Tensors that shared
    storage when saved come back as several records of equal values.

    Raises:
        IntegrityError: It is a pickle that asks to run code, or a zip file of two meanings.
        CheckpointError: It is damaged, no ``torch.save`` file, or holds something other
            than named dense tensors of a known dtype.
    """
    return named_tensors(path, load_pickle(path))


def named_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    """Return the tensors of a state dict that was in ``path``, each with its key as name.

    Raises:
        CheckpointError: It is something else.
    """
    entries = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    bad = [
        f"{_shown(key)} is a {_kind(value)}"
        for key, value in entries
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if bad or not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: {shortened(bad)}",
            expected="one dictionary of names to dense tensors",
            fix="Save model.state_dict(), or the dictionary that the trainer documents",
        )
    return {key: dataclasses.replace(value, name=key) for key, value in loaded.items()}


def stored_names(path: Path) -> frozenset[str]:
    """Return the keys of the dictionary in ``path``, and of the dictionaries in it.

    Raises:
        IntegrityError: It is a pickle that asks to run code, or a zip file of two meanings.
        CheckpointError: It is damaged, or no ``torch.save`` file.
    """
    loaded = load_pickle(path)
    return frozenset(key for key in _keys(loaded) if isinstance(key, str))


def load_pickle(path: Path) -> Any:
    """Return what was saved: dictionaries, lists, numbers, texts, and ``Tensor`` without name.

    Raises:
        IntegrityError: It is a pickle that asks to run code, or a zip file of two meanings.
        CheckpointError: It is damaged, or no ``torch.save`` file.
    """
    try:
        return _from_zip(path) if is_zip(path) else _from_stream(path)
    except BrokenPickleError as error:
        raise damaged(path, f"no pickle that torch.save writes ({error})") from error


def _keys(loaded: object) -> Iterator[object]:
    if isinstance(loaded, dict):
        yield from loaded
        for value in loaded.values():
            if isinstance(value, dict):
                yield from value


def _shown(key: object) -> str:
    return repr(key)[:200] if isinstance(key, str | int | float) else type(key).__name__


def _kind(value: object) -> str:
    return f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _from_zip(path: Path) -> Any:
    members = _torch_members(path, open_zip(path))
    if (order := members.get("byteorder")) and order.read(16) != b"little":
        raise damaged(path, "its numbers are big-endian, or its byteorder is unreadable")
    used: dict[str, ZipMember] = {}

    def storage(value: object) -> Storage:
        kind, key, count = storage_id(value, 5)
        member = members.get(f"data/{key}".casefold())
        if member is None or member.size_bytes != count * NUMPY_DTYPES[kind.dtype].itemsize:
            raise damaged(path, f"{member.name if member else 'a storage'} is missing or cut off")
        used[key] = member
        content = contents.setdefault(member.name, _content(member))
        return Storage(kind.dtype, count, lambda: content)

    contents: dict[str, MappedBytes | InflatedBytes] = {}
    pickle = members["data.pkl"].read(MAX_PICKLE_BYTES)
    loaded = unpickled(io.BytesIO(pickle), KNOWN, storage, where=str(path))
    inflated = sum(member.size_bytes for member in used.values() if not member.is_stored)
    if inflated > MAX_INFLATED_BYTES:
        raise _refusal(path, f"tensors compressed from {inflated:,} bytes")
    if path.stat().st_size <= CHECKED_BYTES:
        for member in used.values():
            if member.is_stored:
                member.read(member.size_bytes)
    return loaded


def _content(member: ZipMember) -> MappedBytes | InflatedBytes:
    if member.is_stored:
        return MappedBytes(member.path, member.offset_bytes, member.size_bytes)
    return InflatedBytes(member)


def _torch_members(path: Path, members: dict[str, ZipMember]) -> dict[str, ZipMember]:
    """Return the members by their names below the one folder that ``torch.save`` writes."""
    folders = {name.partition("/")[0] for name in members}
    inside = {name.partition("/")[2]: member for name, member in members.items()}
    script = [name for name in inside if name == "constants.pkl" or name.startswith("code/")]
    if script or len(folders) > 1:
        raise _refusal(path, shortened(script or sorted(folders)))
    if "data.pkl" not in inside:
        raise CheckpointError(
            f"{path}: a zip file without data.pkl: {shortened(members)}",
            expected="a file written by torch.save",
            fix="Save model.state_dict() with torch.save",
        )
    return inside


def _refusal(path: Path, found: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: a zip file with {found}",
        expected=(
            "one folder, with the pickle of a dictionary of tensors and their bytes, because "
            "TorchScript is a program, and a small file must not fill the memory"
        ),
        fix="Do not load it; ask its author for safetensors",
    )


def _from_stream(path: Path) -> Any:
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if head.getvalue()[257:262] == b"ustar":
        raise damaged(path, "a tar archive, which torch wrote before 2017")
    places: dict[str, MappedBytes] = {}
    wanted: dict[str, tuple[str, int]] = {}

    def storage(value: object) -> Storage:
        kind, key, count = storage_id(value, 6)
        if wanted.setdefault(key, (kind.dtype, count)) != (kind.dtype, count):
            raise BrokenPickleError("a storage of two sizes")
        whole = Storage(kind.dtype, count, lambda: places[key])
        view = value[5]  # type: ignore[index]  # storage_id has looked
        return whole if view is None else _part(whole, view)

    def next_pickle(limit: int) -> Any:
        return unpickled(head, KNOWN, storage, where=str(path), max_opcodes=limit)

    first = unpickled(head, KNOWN, storage, where=str(path))
    if first != _MAGIC or next_pickle(_FEW) != _PROTOCOL:
        raise damaged(path, "a pickle that torch.save did not write")
    system = next_pickle(_FEW)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise damaged(path, "its numbers are big-endian")
    loaded, keys = unpickled(head, KNOWN, storage, where=str(path)), next_pickle(1_000_000)
    _place_storages(path, head.tell(), keys, wanted, places)
    return loaded


def _part(whole: Storage, view: object) -> Storage:
    """Return the part of a storage that (key, offset, count) says: torch's before 0.4."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise BrokenPickleError("a part of a storage that is no part")
    _, begin, count = view
    if type(begin) is not int or type(count) is not int or begin < 0 or count < 0:
        raise BrokenPickleError("a part of a storage that is no part")
    if begin + count > whole.count:
        raise BrokenPickleError("a part reaches beyond its storage")
    return dataclasses.replace(whole, begin=begin, count=count)


def _place_storages(
    path: Path,
    begin: int,
    keys: Any,
    wanted: dict[str, tuple[str, int]],
    places: dict[str, MappedBytes],
) -> None:
    """Fill ``places`` with where each storage of a stream lies, from ``begin`` on."""
    is_whole = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not is_whole or sorted(keys) != sorted(wanted):
        raise BrokenPickleError("its list of storages is not that of its tensors")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        for key in keys:
            dtype, count = wanted[key]
            file.seek(begin)
            if int.from_bytes(file.read(8), "little", signed=True) != count:
                raise damaged(path, "a storage has another size than its tensors")
            length = count * NUMPY_DTYPES[dtype].itemsize
            places[key] = MappedBytes(path, begin + 8, length)
            begin += 8 + length
    if begin > size_bytes:
        raise damaged(path, f"{begin - size_bytes:,} bytes are missing at its end")
