r"""A numpy archive -> its arrays: numbers only, measured before anything is inflated.

The one place that reads npz files. What ``numpy.savez`` writes: a zip file with a member
``NAME.npy`` for each array, which is

    \x93NUMPY, version (1 or 2), header length, header, values

The header is a Python literal, ``{"descr": "<f4", "fortran_order": False, "shape": (2, 3)}``.
Never read: objects (they are pickles), structures, dates, bytes. Format:
https://numpy.org/doc/2.3/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import ast
import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.checkpoint.files.small_file import Refusal, regular_size, system_errors
from mtl_export.checkpoint.files.zip_file import ZipMember, open_zip
from mtl_export.errors import CheckpointError, MtlExportError

if TYPE_CHECKING:  # a device that verifies has numpy, and no ml_dtypes
    from mtl_export.checkpoint.tensors import Array

MOST_ARRAYS = 10_000
MOST_AXES = 32
# Stored members are as large as the file; deflated ones may be 1,000 times that.
MOST_INFLATED_BYTES = 512 << 20
_MOST_HEADER_BYTES = 10_000
_MAGIC = b"\x93NUMPY"
_DTYPE = re.compile(r"[<>=|]?([biufU])([0-9]{1,9})")


def read_npz(
    path: Path, text: str = "", *, error: type[MtlExportError] = CheckpointError, fix: str
) -> tuple[str, dict[str, Array]]:
    """Return the arrays in ``path`` by name, in native byte order, and its text.

    Args:
        path: The file.
        text: Name of the one member that holds a text; empty where none does.
        error: Class of what is raised.
        fix: What to do about another file.

    Raises:
        UsageError: The system does not let this user read it.
        IntegrityError: It can be read in two ways.
        MtlExportError: Of class ``error``: it is no such archive, damaged, too large, or holds
            something else than numbers.
    """

    def refused(found: str) -> MtlExportError:
        expected = "arrays of numbers, saved by numpy.savez"
        return error(f"{path}: {found}", expected=expected, fix=fix)

    with system_errors(path, refused):
        regular_size(path, refused)
        with path.open("rb") as file:
            first = file.read(len(_MAGIC))
        if first == _MAGIC:
            raise refused("one array (.npy), not an archive of arrays (.npz)")
        try:
            members = open_zip(path)
        except CheckpointError as cause:
            raise refused(cause.problem.removeprefix(f"{path}: ")) from cause
    _refuse_large(list(members.values()), refused)
    found, arrays = "", {}
    for member in members.values():
        name = member.name.removesuffix(".npy")
        try:
            content = member.read(member.size_bytes)
        except CheckpointError as cause:
            raise refused(cause.problem.removeprefix(f"{path}: ")) from cause
        values = _values(name, content, refused, is_text=name == text)
        if isinstance(values, str):
            found = values
        else:
            arrays[name] = values
    return found, arrays


def _refuse_large(members: list[ZipMember], refused: Refusal) -> None:
    if len(members) > MOST_ARRAYS:
        raise refused(f"{len(members):,} arrays, more than {MOST_ARRAYS:,}")
    inflated = sum(member.size_bytes for member in members if not member.is_stored)
    if inflated > MOST_INFLATED_BYTES:
        raise refused(
            f"{inflated:,} bytes when inflated, more than {MOST_INFLATED_BYTES:,}; as many may"
            " be saved without compression"
        )


def _values(name: str, content: bytes, refused: Refusal, *, is_text: bool) -> Array | str:
    """Return the array, or the text, in one member."""
    version, width = content[6:7], 2 if content[6:7] == b"\x01" else 4
    begin = len(_MAGIC) + 2 + width
    end = begin + int.from_bytes(content[begin - width : begin], "little")
    if content[: len(_MAGIC)] != _MAGIC or version not in {b"\x01", b"\x02"}:
        raise refused(f"{name!r} is no array")
    if end - begin > _MOST_HEADER_BYTES or end > len(content):
        raise refused(f"{name!r} has a header of {end - begin:,} bytes")
    dtype, shape, order = _header(name, content[begin:end], refused)
    if (dtype.kind == "U") != is_text or (is_text and shape):
        raise refused(f"{name!r} is {dtype} {list(shape)}")
    if prod(size or 1 for size in shape) >= 2**48:  # numpy multiplies these all the same
        raise refused(f"{name!r} has the shape {shape!r:.60}")
    if prod(shape) * dtype.itemsize != len(content) - end:
        raise refused(f"{name!r} has {len(content) - end:,} bytes, not {dtype} {list(shape)}")
    if is_text:
        try:
            big = dtype.byteorder == ">"
            return content[end:].decode("utf-32-be" if big else "utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise refused(f"{name!r} is no text") from error
    flat = np.frombuffer(content, dtype, prod(shape), end) if prod(shape) else np.empty(0, dtype)
    return flat.reshape(shape, order=order).astype(dtype.newbyteorder("="), order="C")


def _header(
    name: str, header: bytes, refused: Refusal
) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    """Return dtype, shape and order ("C" or "F") of an array.

    Raises:
        MtlExportError: What ``refused`` gives.
    """
    try:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        described, shape, is_fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        if not isinstance(described, str) or not _DTYPE.fullmatch(described):
            raise TypeError(f"dtype {described!r:.60}")
        dtype = np.dtype(described)
    except (SyntaxError, ValueError, TypeError, LookupError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise refused(f"{name!r} is no array of numbers ({reason[0]:.200})") from error
    if not isinstance(shape, tuple) or len(shape) > MOST_AXES:
        raise refused(f"{name!r} has the shape {shape!r:.60}")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise refused(f"{name!r} has the shape {shape!r:.60}")
    return dtype, shape, "F" if is_fortran is True else "C"
