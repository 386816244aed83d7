"""Who makes chunks: a process for every core, or the calling threads themselves.

Folding is many short numpy calls. In threads they wait for the interpreter's lock more
than they compute (two threads took as long as one), so workers are forked; they read the
base and write nothing but shared memory, and end when the parent does, however it ends.
Where the system cannot fork, or the work is small, the threads compute.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mtl_export import errors
from mtl_export.errors import MtlExportError
from mtl_export.merge.chunks import Chunk, Slot
from mtl_export.merge.fold_chunk import BlockSums, ChunkMerger

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# Forking two workers takes 20 ms; threads fold this much in that time.
FORK_BYTES = 32 << 20
# Numbers of chunk, batch and slot.
_JOB = struct.Struct("<3I")


class Workers(Protocol):
    """Makes chunks for several threads."""

    def make(self, chunk: int, batch: int, slot: int) -> list[BlockSums]:
        """Fill a slot with a batch of a chunk's outputs; all three by number."""
        ...

    def close(self) -> None:
        """End."""
        ...


def start_workers(
    count: int,
    new_merger: Callable[[], ChunkMerger],
    chunks: Sequence[Chunk],
    slots: Sequence[Slot],
    size_bytes: int,
) -> Workers:
    """Return ``count`` workers, processes if they pay and the system has them.

    Args:
        count: How many.
        new_merger: Makes what one of them computes with.
        chunks: The work.
        slots: The memory it goes through.
        size_bytes: How much there is to write.
    """
    if count > 1 and size_bytes >= FORK_BYTES and sys.platform == "linux":
        return ProcessWorkers(count, new_merger, chunks, slots)
    return ThreadWorkers(new_merger, chunks, slots)


class ThreadWorkers:
    """The calling threads, each at its own slot.

    Args:
        new_merger: Makes what one of them computes with.
        chunks: The work.
        slots: The memory; one a thread.
    """

    def __init__(
        self, new_merger: Callable[[], ChunkMerger], chunks: Sequence[Chunk], slots: Sequence[Slot]
    ) -> None:
        self._mergers = [new_merger() for _ in slots]
        self._chunks, self._slots = chunks, slots

    def make(self, chunk: int, batch: int, slot: int) -> list[BlockSums]:
        """Compute here and now."""
        return self._mergers[slot].make(self._chunks[chunk], batch, self._slots[slot])

    def close(self) -> None:
        """Do nothing."""


class ProcessWorkers:
    """Forked processes that take their work from one queue, as soon as they are free.

    The queue is a pipe that all of them read: a worker that has finished finds the next job
    there, and waits for no thread of the parent to hear of it first.

    Args:
        count: How many.
        new_merger: Makes what one of them computes with.
        chunks: The work, which they know from their birth.
        slots: The memory, which they share; one a thread of the parent.
    """

    def __init__(
        self,
        count: int,
        new_merger: Callable[[], ChunkMerger],
        chunks: Sequence[Chunk],
        slots: Sequence[Slot],
    ) -> None:
        from multiprocessing.connection import Pipe

        jobs, self._queue = os.pipe()
        answers = [Pipe(duplex=False) for _ in slots]
        self._answers = [ours for ours, _ in answers]
        self._lives: list[int] = []
        self._children: list[int] = []
        for _ in range(count):
            life, own_end = os.pipe()
            with warnings.catch_warnings():
                # Python 3.12 warns of locks that other threads hold; a worker takes none.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                # A worker that kept the queue's other end would not hear that it was closed.
                os.close(self._queue)
                _live(jobs, [theirs for _, theirs in answers], new_merger, chunks, slots)
            # Only the worker holds it now: its death can be read from ``life``.
            os.close(own_end)
            self._lives.append(life)
            self._children.append(child)
        os.close(jobs)
        for _, theirs in answers:
            theirs.close()
        self._events = [self._events_of(answer) for answer in self._answers]

    def _events_of(self, answer: Connection[Any, Any]) -> select.poll:
        """Return what waits for an answer, or for the death of any worker."""
        events = select.poll()
        for file in (answer.fileno(), *self._lives):
            events.register(file, select.POLLIN)
        return events

    def make(self, chunk: int, batch: int, slot: int) -> list[BlockSums]:
        """Have a free worker compute.

        Raises:
            MtlExportError: As the worker raised it.
            OSError: Likewise.
            RuntimeError: A worker has died, or found a bug.
        """
        try:
            os.write(self._queue, _JOB.pack(chunk, batch, slot))
            ready = {file for file, _ in self._events[slot].poll()}
            if self._answers[slot].fileno() not in ready:
                raise EOFError
            kind, found = self._answers[slot].recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a worker process has died; was it killed for memory?") from error
        if kind == "made":
            measured: list[BlockSums] = found
            return measured
        if kind == "error":
            name = found.pop("error")
            raise getattr(errors, name)(**found)
        if kind == "system":
            raise OSError(*found)
        raise RuntimeError(found)

    def close(self) -> None:
        """Let the workers end, and wait for it."""
        os.close(self._queue)
        for answer in self._answers:
            answer.close()
        for child in self._children:
            os.waitpid(child, 0)
        for life in self._lives:
            os.close(life)


def _live(
    jobs: int,
    answers: Sequence[Connection[Any, Any]],
    new_merger: Callable[[], ChunkMerger],
    chunks: Sequence[Chunk],
    slots: Sequence[Slot],
) -> None:
    """Be a worker until the parent closes its end, or dies; never return."""
    try:
        # An interrupt from the keyboard is the parent's to handle.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        merger = new_merger()
        # A pipe hands out whole what was written whole, if it is as short as this.
        while job := os.read(jobs, _JOB.size):
            chunk, batch, slot = _JOB.unpack(job)
            answers[slot].send(_answer(merger, chunks[chunk], batch, slots[slot]))
        os._exit(0)
    except OSError:
        os._exit(0)
    finally:
        os._exit(1)


def _answer(merger: ChunkMerger, chunk: Chunk, batch: int, slot: Slot) -> tuple[str, Any]:
    try:
        return "made", merger.make(chunk, batch, slot)
    except MtlExportError as error:
        return "error", error.as_dict()
    except OSError as error:
        return "system", (error.errno, error.strerror, error.filename)
    except Exception:
        return "bug", traceback.format_exc()
