"""A zip file -> its members, found and measured before one byte is inflated.

The one place that opens zip files: what ``torch.save`` (https://github.com/pytorch/pytorch) and
``numpy.savez`` write. Two readers must never see two different things in one file, so a file
that could be read in two ways is refused: names that differ only in case, members that
overlap, bytes before the first member or behind the end. What is damaged is a
``CheckpointError``, what is ambiguous or a bomb an ``IntegrityError``.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.6 to 4.3.16.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mtl_export.errors import CheckpointError, IntegrityError, shortened

FIRST_BYTES = (b"PK\x03\x04", b"PK\x05\x06")
# A checkpoint of 50,000 tensors has 50,006 members and a directory of 7 MB.
MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 16 << 20
_END = struct.Struct("<4s4H2LH")  # end of central directory, without a comment
_LOCATOR = struct.Struct("<4sLQL")  # where the zip64 end record lies
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1
_DAMAGE = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error,
           OverflowError, zlib.error, zipfile.LargeZipFile, MemoryError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One file in a zip file.

    Attributes:
        path: The zip file.
        name: Its name, as stored.
        offset_bytes: Where its bytes begin, from the start of the zip file.
        stored_bytes: How many there are.
        size_bytes: How many they are when inflated; the same if ``is_stored``.
        is_stored: Whether they lie there as they are, so that they can be mapped.
        crc32: Checksum of the inflated bytes.
    """

    path: Path
    name: str
    offset_bytes: int
    stored_bytes: int
    size_bytes: int
    is_stored: bool
    crc32: int

    def read(self, limit_bytes: int) -> bytes:
        """Return its inflated bytes, checksum compared.

        Raises:
            IntegrityError: It announces, or holds, more than ``limit_bytes``.
            CheckpointError: It is damaged.
        """
        # What cannot be compressed grows by 5 bytes in 16,000.
        if max(self.size_bytes, self.stored_bytes * 255 // 256 - 64) > limit_bytes:
            raise IntegrityError(
                f"{self.path}: {self.name}: {self.size_bytes:,} bytes from {self.stored_bytes:,} "
                "in the file",
                expected=f"at most {limit_bytes:,}, because a small file must not fill the memory",
                fix="Do not load it; ask its author for safetensors",
            )
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset_bytes)
                content = file.read(self.stored_bytes)
            if not self.is_stored:
                inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                content = inflate.decompress(content, self.size_bytes + 1)
        except _DAMAGE as error:
            raise damaged(self.path, f"{self.name}: {error}") from error
        if len(content) != self.size_bytes or zlib.crc32(content) != self.crc32:
            raise damaged(self.path, f"{self.name} does not match its checksum")
        return content


def is_zip(path: Path) -> bool:
    """Return whether the file begins as a zip file, which is how torch and numpy tell."""
    with path.open("rb") as file:
        return file.read(4) in FIRST_BYTES


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file that is not what its writer wrote."""
    return CheckpointError(
        f"{path}: damaged: {reason}",
        expected="a whole file, as it was saved",
        fix="Copy or save the file again; compare its size with the original",
    )


def open_zip(path: Path) -> dict[str, ZipMember]:
    """Return the members of a zip file by their names in lower case (case folded).

    Raises:
        CheckpointError: It is damaged, encrypted or packed in another way than deflate.
        IntegrityError: It can be read in two ways, or has more members than any checkpoint.
        OSError: The system refuses to open it.
    """
    with path.open("rb") as file:
        try:
            _check_directory(path, file)
            with zipfile.ZipFile(file) as archive:
                infos, end = archive.infolist(), archive.start_dir
            members = [_member(path, file, info) for info in infos]
        except _DAMAGE as error:
            raise damaged(path, str(error) or type(error).__name__) from error
    _refuse_ambiguous(path, infos, members, end)
    return {member.name.casefold(): member for member in members}


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Refuse, before it is read, a directory that is not at the end or too large."""
    size_bytes = file.seek(0, 2)
    file.seek(max(size_bytes - _END.size, 0))
    signature, *_, count, directory_bytes, _, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        raise zipfile.BadZipFile("the zip directory is not at its end; cut off, or added to")
    behind = size_bytes - _END.size - _LOCATOR.size
    if behind >= 0:
        file.seek(behind)
        locator, _, offset, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if locator == b"PK\x06\x07":
            file.seek(offset)
            *_, count, directory_bytes, _ = _END64.unpack(file.read(_END64.size))
    file.seek(0)
    if count > MAX_MEMBERS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise _ambiguous(path, f"a directory of {count:,} members, {directory_bytes:,} bytes")


def _member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> ZipMember:
    """Return the member, its place taken from the header that stands before its bytes."""
    if info.flag_bits & _ENCRYPTED:
        raise zipfile.BadZipFile(f"{info.orig_filename!r} is encrypted")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise zipfile.BadZipFile(f"{info.orig_filename!r} is packed by method {info.compress_type}")
    is_stored = info.compress_type == zipfile.ZIP_STORED
    if is_stored and info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.orig_filename!r} has two sizes")
    file.seek(info.header_offset)
    signature, *_, name_bytes, extra_bytes = _LOCAL.unpack(file.read(_LOCAL.size))
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if signature != b"PK\x03\x04" or file.read(name_bytes).decode(encoding) != info.orig_filename:
        raise zipfile.BadZipFile(f"{info.orig_filename!r} has another name before its bytes")
    return ZipMember(
        path,
        info.orig_filename,
        info.header_offset + _LOCAL.size + name_bytes + extra_bytes,
        info.compress_size,
        info.file_size,
        is_stored,
        info.CRC,
    )


def _refuse_ambiguous(
    path: Path, infos: list[zipfile.ZipInfo], members: list[ZipMember], end: int
) -> None:
    if len(members) > MAX_MEMBERS:
        raise _ambiguous(path, f"{len(members):,} members")
    seen: set[str] = set()
    problems = []
    for member in members:
        folded = member.name.casefold()
        if folded in seen:
            problems.append(f"{member.name!r} twice")
        if "\\" in folded or "\0" in folded or folded.startswith("/") or ".." in folded.split("/"):
            problems.append(f"{member.name!r}")
        seen.add(folded)
    position = 0
    for info, member in sorted(
        zip(infos, members, strict=True), key=lambda pair: pair[0].header_offset
    ):
        if info.header_offset < position or (position == 0 and info.header_offset):
            problems.append(f"{member.name!r} at {info.header_offset:,}, not {position:,}")
        position = member.offset_bytes + member.stored_bytes
    if position > end:
        problems.append(f"members that reach to {position:,}, beyond {end:,}")
    if problems:
        raise _ambiguous(path, shortened(problems))


def _ambiguous(path: Path, found: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: a zip file with {found}",
        expected=(
            f"at most {MAX_MEMBERS:,} members, each once, one after the other, because another "
            "program may read another content from it"
        ),
        fix="Do not load it; ask its author for safetensors",
    )
