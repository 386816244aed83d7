"""One pass over the base that writes every file of a ``Layout``.

    base file --read--> chunk --+--> copy or round --+--> write, hash    task 1
                                +--> fold, round   --+--> write, hash    task 2 ...
                     worker processes                       threads

Chunks are a few megabytes of whole rows, taken in file order by a few threads. Each has
its chunk made by a worker (``workers``), then writes and hashes the outputs (``hashed_files``).
Reading, computing and writing overlap because the threads are at different places, and
memory is a few buffers a thread, whatever the model's size. The base is read once and,
where asked for, hashed on the way.

Not used: ``copy_file_range`` for tensors that are only copied. Their bytes must be hashed,
so they pass through memory anyway, and writing them from there costs what the system
call does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.merge.base_files import BaseFiles
from mtl_export.merge.chunks import Chunk, Destination, Slot, chunks_of, slot_for
from mtl_export.merge.drift import Squares
from mtl_export.merge.fold import rounded
from mtl_export.merge.fold_chunk import ChunkMerger, bytes_of
from mtl_export.merge.hashed_files import CancelledError, HashedOutput, HashedPrefix
from mtl_export.merge.layout import OutputFile
from mtl_export.merge.workers import Workers, start_workers

# How often the caller hears of the progress, in seconds.
TICK_S = 0.5
# Threads beyond one a worker: these write and hash while all workers compute.
WRITERS = 4


class Pass:
    """The pass; ``run`` it once.

    Args:
        bound: The adapter and its base.
        files: What to write, each with its place.
        resumed: How much of a file is there already, by its place.
        hash_base: Hash the base's files on the way.

    Attributes:
        total_bytes: What there is to write.
        squares: By task name and module, then by first row, what was measured.
    """

    def __init__(
        self,
        bound: BoundModel,
        files: Sequence[tuple[Path, OutputFile]],
        *,
        resumed: Mapping[Path, HashedPrefix] | None = None,
        hash_base: bool = False,
    ) -> None:
        self._bound = bound
        self._files = files
        self._resumed = resumed or {}
        self._stack = ExitStack()
        self._outputs: dict[Path, HashedOutput] = {}
        self._base = BaseFiles(bound, hashed=hash_base)
        self._take = threading.Lock()
        self._error: BaseException | None = None
        self._done_bytes = 0
        self.total_bytes = sum(piece.size_bytes for _, file in files for piece in file.pieces)
        self.squares: dict[tuple[str, str], dict[int, Squares]] = {}

    def run(self, tick: Callable[[int], None]) -> None:
        """Write everything.

        Args:
            tick: Called now and then with the bytes written so far.

        Raises:
            BaseModelError: A weight is not finite in its output dtype.
            OSError: A file cannot be read or written.
        """
        with self._stack:
            places = self._open()
            chunks = list(chunks_of(self._bound, places, hash_base=self._base.hashed))
            count = core_count()
            slots = [Slot(*slot_for(chunks)) for _ in range(count + WRITERS)]
            workers = start_workers(count, self._new_merger, chunks, slots, self.total_bytes)
            self._stack.callback(workers.close)
            order = iter(range(len(chunks)))
            threads = [
                threading.Thread(
                    target=self._work, args=(workers, order, chunks, number, slot), daemon=True
                )
                for number, slot in enumerate(slots)
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(TICK_S)
                        tick(self._done_bytes)
            except BaseException as error:
                self._fail(error)
                for thread in threads:
                    thread.join()
                raise
        if self._error is not None:
            raise self._error
        tick(self._done_bytes)

    def progress(self) -> dict[Path, HashedPrefix]:
        """Return how far each file is; may be called from ``tick``."""
        return {path: output.progress() for path, output in list(self._outputs.items())}

    def base_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each base file, by name, if the base was hashed."""
        return self._base.digests()

    def _new_merger(self) -> ChunkMerger:
        return ChunkMerger(self._bound, self._base)

    def _open(self) -> dict[int, list[Destination]]:
        """Open every output file; return where the pieces go, by their order."""
        places: dict[int, list[Destination]] = {}
        headers = [file.header() for _, file in self._files]
        with ThreadPoolExecutor(core_count()) as pool:  # what is resumed is hashed
            outputs = list(pool.map(self._opened, self._files, headers))
        for (path, file), header, output in zip(self._files, headers, outputs, strict=True):
            self._stack.callback(output.close)
            self._outputs[path] = output
            self._done_bytes += output.begun_at - len(header)
            offset = len(header)
            for piece in file.pieces:
                places.setdefault(piece.order, []).append(Destination(piece, output, offset))
                offset += piece.size_bytes
        self._base.open(self._stack)
        return places

    def _opened(self, place: tuple[Path, OutputFile], header: bytes) -> HashedOutput:
        path, file = place
        size = len(header) + sum(piece.size_bytes for piece in file.pieces)
        return HashedOutput(path, header, size, self._resumed.get(path))

    def _work(
        self,
        workers: Workers,
        order: Iterator[int],
        chunks: Sequence[Chunk],
        number: int,
        slot: Slot,
    ) -> None:
        """Take chunks in order until there are none: have them made, write and hash them."""
        try:
            while self._error is None:
                with self._take:
                    index = next(order, None)
                if index is None:
                    return
                chunk = chunks[index]
                if chunk.source is None:
                    self._write_value(chunk)
                    continue
                for batch, targets in enumerate(chunk.batches):
                    measured = workers.make(index, batch, number)
                    with self._take:
                        for one in measured:
                            blocks = self.squares.setdefault((one.task, one.module), {})
                            blocks[one.row] = one.squares
                    if batch == 0 and chunk.is_hashed:
                        self._base.hash(chunk.source, chunk.begin, slot.base(chunk))
                    for target, values in zip(targets, slot.outputs(chunk, batch), strict=True):
                        self._write(target, chunk.begin, values)
        except CancelledError:
            return
        except BaseException as error:
            self._fail(error)

    def _write_value(self, chunk: Chunk) -> None:
        for target in chunk.batches[0]:
            if target.piece.values is not None:
                piece = target.piece
                values = rounded(target.piece.values(), piece.dtype, piece.name)
                self._write(target, 0, values.reshape(-1))

    def _write(self, target: Destination, begin: int, values: Array) -> None:
        data = bytes_of(values)
        target.output.write(target.place(begin), data.data, data.ctypes.data)
        with self._take:
            self._done_bytes += data.nbytes

    def _fail(self, error: BaseException) -> None:
        with self._take:
            self._error = self._error or error
        for output in (*self._outputs.values(), *self._base.hashes.values()):
            output.cancel()


def core_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
