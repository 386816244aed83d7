"""Files that several threads write or read in any order and that are hashed in file order.

SHA-256 must see a file from front to back. A lane lets every thread do its reading or
writing at once and then wait for its turn to hash, so that hashing costs no second pass
over the disk. Turns are given by offset: threads that take their work in file order never
wait in a circle, because the one that is furthest behind never waits.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

# After this many bytes the system is told to begin writing back, so that the disk works
# while we compute and a later sync finds little to do.
WRITE_BACK_BYTES = 32 << 20


class CancelledError(Exception):
    """Another thread failed; this one gives up."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file is: its first bytes, and their hash.

    Attributes:
        done_bytes: How many are written.
        sha256: Of these bytes, 64 hex digits.
    """

    done_bytes: int
    sha256: str


class Lane:
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

    def progress(self) -> Progress:
        """Return how much is hashed; may be called while others write."""
        with self._turn:
            position, settled = self._settled
        return Progress(position, settled.hexdigest())


class WriteLane(Lane):
    """An output file.

    Args:
        path: The file; created, or continued where ``resumed`` says so.
        header: What it begins with.
        resumed: How much of it an earlier run says is there. That is checked, and if it is
            not so the file is begun anew. None for a new file.

    Attributes:
        path: The file.
        begun_at: How many bytes were there already, or are the header.
    """

    def __init__(self, path: Path, header: bytes, resumed: Progress | None = None) -> None:
        super().__init__()
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._start_lock = threading.Lock()
        self._written_back = 0
        if resumed is None or not self._take_up(resumed):
            os.ftruncate(self._file, 0)
            self.write(0, memoryview(header))
        self.begun_at = self._position

    def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at ``offset``, then hash it in its turn."""
        write_at(self._file, data, offset)
        self.hash_at(offset, data)
        self._write_back()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _take_up(self, resumed: Progress) -> bool:
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

    def _write_back(self) -> None:
        if not hasattr(os, "posix_fadvise") or not self._start_lock.acquire(blocking=False):
            return
        try:
            begin, end = self._written_back, self._position
            if end - begin >= WRITE_BACK_BYTES:
                # On Linux, "not needed" starts writing the dirty pages of the range and
                # does not wait; pages that are not on the disk yet stay in memory.
                os.posix_fadvise(self._file, begin, end - begin, os.POSIX_FADV_DONTNEED)
                self._written_back = end
        finally:
            self._start_lock.release()


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
