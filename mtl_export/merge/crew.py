"""Who makes chunks: a process for every core, or the calling threads themselves.

Folding is many short numpy calls. In threads they wait for the interpreter's lock more
than they compute (two threads took as long as one), so workers are forked; they read the
base and write nothing but shared memory, and end when the parent does, however it ends.
Where the system cannot fork, or the work is small, the threads compute.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mtl_export import errors
from mtl_export.errors import MtlExportError
from mtl_export.merge.chunks import Chunk, Slot
from mtl_export.merge.maker import Maker, Measured

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# Forking two workers takes 20 ms; threads fold this much in that time.
FORK_BYTES = 32 << 20


class Crew(Protocol):
    """Makes chunks for several threads."""

    def make(self, chunk: int, batch: int, slot: int) -> list[Measured]:
        """Fill a slot with a batch of a chunk's outputs; all three by number."""
        ...

    def close(self) -> None:
        """End."""
        ...


def hire(
    count: int,
    new_maker: Callable[[], Maker],
    chunks: Sequence[Chunk],
    slots: Sequence[Slot],
    size_bytes: int,
) -> Crew:
    """Return ``count`` workers, processes if they pay and the system has them.

    Args:
        count: How many.
        new_maker: Makes what one of them computes with.
        chunks: The work.
        slots: The memory it goes through.
        size_bytes: How much there is to write.
    """
    if count > 1 and size_bytes >= FORK_BYTES and sys.platform == "linux":
        return ProcessCrew(count, new_maker, chunks, slots)
    return ThreadCrew(new_maker, chunks, slots)


class ThreadCrew:
    """The calling threads, each at its own slot.

    Args:
        new_maker: Makes what one of them computes with.
        chunks: The work.
        slots: The memory; one a thread.
    """

    def __init__(
        self, new_maker: Callable[[], Maker], chunks: Sequence[Chunk], slots: Sequence[Slot]
    ) -> None:
        self._makers = [new_maker() for _ in slots]
        self._chunks, self._slots = chunks, slots

    def make(self, chunk: int, batch: int, slot: int) -> list[Measured]:
        """Compute here and now."""
        return self._makers[slot].make(self._chunks[chunk], batch, self._slots[slot])

    def close(self) -> None:
        """Do nothing."""


class ProcessCrew:
    """Forked processes; ``make`` waits for a free one.

    Args:
        count: How many.
        new_maker: Makes what one of them computes with.
        chunks: The work, which they know from their birth.
        slots: The memory, which they share.
    """

    def __init__(
        self,
        count: int,
        new_maker: Callable[[], Maker],
        chunks: Sequence[Chunk],
        slots: Sequence[Slot],
    ) -> None:
        from multiprocessing.connection import Pipe

        self._free: queue.LifoQueue[Connection[Any, Any]] = queue.LifoQueue()
        self._ends: list[Connection[Any, Any]] = []
        self._children: list[int] = []
        for _ in range(count):
            ours, theirs = Pipe()
            self._ends.append(ours)
            with warnings.catch_warnings():
                # Python 3.12 warns of locks that other threads hold; a worker takes none.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                _live(self._ends, theirs, new_maker, chunks, slots)
            theirs.close()
            self._children.append(child)
            self._free.put(ours)

    def make(self, chunk: int, batch: int, slot: int) -> list[Measured]:
        """Have a free worker compute.

        Raises:
            MtlExportError: As the worker raised it.
            OSError: Likewise.
            RuntimeError: The worker has died, or found a bug.
        """
        worker = self._free.get()
        try:
            worker.send((chunk, batch, slot))
            kind, found = worker.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a worker process has died; was it killed for memory?") from error
        finally:
            self._free.put(worker)
        if kind == "made":
            measured: list[Measured] = found
            return measured
        if kind == "error":
            name = found.pop("error")
            raise getattr(errors, name)(**found)
        if kind == "system":
            raise OSError(*found)
        raise RuntimeError(found)

    def close(self) -> None:
        """Let the workers end, and wait for it."""
        for end in self._ends:
            end.close()
        for child in self._children:
            os.waitpid(child, 0)


def _live(
    parents: Sequence[Connection[Any, Any]],
    work: Connection[Any, Any],
    new_maker: Callable[[], Maker],
    chunks: Sequence[Chunk],
    slots: Sequence[Slot],
) -> None:
    """Be a worker until the parent closes its end, or dies; never return."""
    try:
        # An interrupt from the keyboard is the parent's to handle.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for end in parents:  # or siblings would keep the pipe open after the parent's death
            end.close()
        maker = new_maker()
        while True:
            chunk, batch, slot = work.recv()
            work.send(_answer(maker, chunks[chunk], batch, slots[slot]))
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


def _answer(maker: Maker, chunk: Chunk, batch: int, slot: Slot) -> tuple[str, Any]:
    try:
        return "made", maker.make(chunk, batch, slot)
    except MtlExportError as error:
        return "error", error.as_dict()
    except OSError as error:
        return "system", (error.errno, error.strerror, error.filename)
    except Exception:
        return "bug", traceback.format_exc()
