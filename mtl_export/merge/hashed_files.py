"""Files that several threads write or read in any order and that are hashed in file order.

SHA-256 must see a file from front to back. This lets every thread do its reading or
writing at once and then wait for its turn to hash, so that hashing costs no second pass
over the disk. Turns are given by offset: threads that take their work in file order never
wait in a circle, because the one that is furthest behind never waits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

# Files from this size on are written past the page cache (O_DIRECT): that takes a tenth of
# the processor time of a write through it, the disk works while we compute, and nothing is
# left to be written back. Smaller ones stay in memory for whoever loads them next.
DIRECT_BYTES = 64 << 20
# What O_DIRECT wants offsets, sizes and addresses to be multiples of.
PAGE = 4096


class CancelledError(Exception):
    """Another thread failed; this one gives up."""


@dataclass(frozen=True, slots=True)
class HashedPrefix:
    """How far a file is: its first bytes, and their hash.

    Attributes:
        done_bytes: How many are written.
        sha256: Of these bytes, 64 hex digits.
    """

    done_bytes: int
    sha256: str


class HashedFile:
    """Hashes a file's bytes in order, whoever brings them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._turn = threading.Condition()
        self._position = 0
        self._settled = (0, self._hash)
        self._cancelled = False

    def hash_at(self, offset: int, data: memoryview) -> None:
        """Hash ``data``, which lies at ``offset``, once everything before it is hashed.

        Raises:
            CancelledError: ``cancel`` was called.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._position >= offset or self._cancelled)
            if self._cancelled:
                raise CancelledError
            if self._position > offset:
                raise RuntimeError(f"byte {offset} came after byte {self._position}")
        self._hash.update(data)
        settled = self._hash.copy()
        with self._turn:
            self._position += len(data)
            self._settled = (self._position, settled)
            self._turn.notify_all()

    def _restart(self) -> None:
        self._hash, self._position = hashlib.sha256(), 0
        self._settled = (0, self._hash)

    def cancel(self) -> None:
        """Wake everyone who waits for a turn that will not come."""
        with self._turn:
            self._cancelled = True
            self._turn.notify_all()

    def progress(self) -> HashedPrefix:
        """Return how much is hashed; may be called while others write."""
        with self._turn:
            position, settled = self._settled
        return HashedPrefix(position, settled.hexdigest())


class HashedOutput(HashedFile):
    """An output file.

    Args:
        path: The file; created, or continued where ``resumed`` says so.
        header: What it begins with.
        size_bytes: How large it will be.
        resumed: How much of it an earlier run says is there. That is checked, and if it is
            not so the file is begun anew. None for a new file.

    Attributes:
        path: The file.
        begun_at: How many bytes were there already, or are the header.
    """

    def __init__(
        self, path: Path, header: bytes, size_bytes: int, resumed: HashedPrefix | None = None
    ) -> None:
        super().__init__()
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        if resumed is None or not self._take_up(resumed):
            os.ftruncate(self._file, 0)
            write_at(self._file, memoryview(header), 0)
            self.hash_at(0, memoryview(header))
        self._direct = _open_direct(path) if size_bytes >= DIRECT_BYTES else None
        self.begun_at = self._position

    def write(self, offset: int, data: memoryview, address: int) -> None:
        """Write ``data`` at ``offset``, then hash it in its turn.

        Args:
            offset: Where in the file.
            data: What.
            address: Where ``data`` lies in memory; whole pages go past the page cache if
                it is ``offset`` modulo ``PAGE``.
        """
        begin = -offset % PAGE
        end = begin + (len(data) - begin) // PAGE * PAGE
        if self._direct is None or (address - offset) % PAGE or end <= begin:
            write_at(self._file, data, offset)
        else:
            self._write_directly(data[begin:end], offset + begin)
            # Pages that are shared with the neighbours go through the cache.
            write_at(self._file, data[:begin], offset)
            write_at(self._file, data[end:], offset + end)
        self.hash_at(offset, data)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def _write_directly(self, data: memoryview, offset: int) -> None:
        done = 0
        try:
            while self._direct is not None and done < len(data):
                done += os.pwrite(self._direct, data[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        write_at(self._file, data[done:], offset + done)

    def _take_up(self, resumed: HashedPrefix) -> bool:
        """Hash what is there; return whether it is what ``resumed`` says."""
        block = memoryview(bytearray(1 << 20))
        try:
            while self._position < resumed.done_bytes:
                wanted = block[: min(len(block), resumed.done_bytes - self._position)]
                read_at(self._file, wanted, self._position)
                self.hash_at(self._position, wanted)
        except OSError:  # shorter than it was
            pass
        if self.progress() == resumed:
            return True
        self._restart()
        return False


def _open_direct(path: Path) -> int | None:
    """Open ``path`` past the page cache; None where the system or the disk cannot."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def read_at(file: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset`` of the open ``file``.

    Raises:
        OSError: The file ends before.
    """
    done = 0
    while done < len(buffer):
        count = _read_some(file, buffer[done:], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` to the open ``file`` at ``offset``."""
    done = 0
    while done < len(data):
        done += _write_some(file, data[done:], offset + done)


if hasattr(os, "preadv"):

    def _read_some(file: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(file, [buffer], offset)

    def _write_some(file: int, data: memoryview, offset: int) -> int:
        return os.pwrite(file, data, offset)

else:  # Windows: a file has one position, which threads take in turns
    _position_lock = threading.Lock()

    def _read_some(file: int, buffer: memoryview, offset: int) -> int:
        with _position_lock:
            os.lseek(file, offset, os.SEEK_SET)
            data = os.read(file, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _write_some(file: int, data: memoryview, offset: int) -> int:
        with _position_lock:
            os.lseek(file, offset, os.SEEK_SET)
            return os.write(file, data)
