"""One pass over the base that writes every file of a ``Layout``.

    base file --read--> chunk --+--> copy or round --+--> write, hash    task 1
                                +--> fold, round   --+--> write, hash    task 2 ...

Chunks are a few megabytes of whole rows, taken in file order by a thread for every core and
one more. Each thread reads its chunk, and for every task folds it in blocks that
stay in its core's cache, writes it and hashes it: the three overlap because threads are
at different places, and memory is a few buffers a thread, whatever the model's size. The
base is read once and, where asked for, hashed on the way.

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
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.merge.base_files import BaseFiles
from mtl_export.merge.drift import SAMPLE, Squares, measure
from mtl_export.merge.lanes import PAGE, CancelledError, Progress, WriteLane
from mtl_export.merge.layout import OutputFile, Piece
from mtl_export.merge.merge import BLOCK, Delta, refuse_not_finite, task_delta
from mtl_export.merge.rounding import Scratch, round_values

CHUNK_BYTES = 2 << 20
# How many tasks are folded from one widened block; bounds the output buffers of a thread.
TOGETHER = 8
# How often the caller hears of the progress, in seconds.
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """Where one piece goes.

    Attributes:
        piece: The piece.
        lane: Its file.
        offset: Where in it.
    """

    piece: Piece
    lane: WriteLane
    offset: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive elements of one base tensor, or one value of the checkpoint.

    Attributes:
        source: The base tensor; None for a value.
        begin: First element.
        end: Behind the last.
        targets: Where they go.
        is_hashed: Whether this reading counts for the base's hash.
    """

    source: Tensor | None
    begin: int
    end: int
    targets: tuple[Target, ...]
    is_hashed: bool


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
        resumed: Mapping[Path, Progress] | None = None,
        hash_base: bool = False,
    ) -> None:
        self._bound = bound
        self._files = files
        self._resumed = resumed or {}
        self._stack = ExitStack()
        self._lanes: dict[Path, WriteLane] = {}
        self._base = BaseFiles(bound, hashed=hash_base)
        self._deltas = _Deltas(bound)
        self._take = threading.Lock()
        self._error: BaseException | None = None
        self._done_bytes = 0
        self.total_bytes = sum(piece.size_bytes for _, file in files for piece in file.pieces)
        self.squares: dict[tuple[str, str], dict[int, Squares]] = {}

    def run(self, tick: Callable[[int], None], threads: int | None = None) -> None:
        """Write everything.

        Args:
            tick: Called now and then with the bytes written so far.
            threads: How many; None for one a core and one more, because some wait for
                the disk.

        Raises:
            BaseModelError: A weight is not finite in its output dtype.
            OSError: A file cannot be read or written.
        """
        with self._stack:
            chunks = self._chunks(self._open())
            workers = [
                threading.Thread(target=self._work, args=(chunks,), daemon=True)
                for _ in range(threads or core_count() + 1)
            ]
            for worker in workers:
                worker.start()
            try:
                for worker in workers:
                    while worker.is_alive():
                        worker.join(TICK_S)
                        tick(self._done_bytes)
            except BaseException as error:
                self._fail(error)
                for worker in workers:
                    worker.join()
                raise
        if self._error is not None:
            raise self._error
        tick(self._done_bytes)

    def progress(self) -> dict[Path, Progress]:
        """Return how far each file is; may be called from ``tick``."""
        return {path: lane.progress() for path, lane in list(self._lanes.items())}

    def base_digests(self) -> dict[str, str]:
        """Return the SHA-256 of each base file, by name, if the base was hashed."""
        return self._base.digests()

    def _open(self) -> dict[int, list[Target]]:
        """Open every output file; return where the pieces go, by their order."""
        places: dict[int, list[Target]] = {}
        headers = [file.header() for _, file in self._files]
        with ThreadPoolExecutor(core_count()) as pool:  # what is resumed is hashed
            lanes = list(pool.map(self._lane, self._files, headers))
        for (path, file), header, lane in zip(self._files, headers, lanes, strict=True):
            self._stack.callback(lane.close)
            self._lanes[path] = lane
            self._done_bytes += lane.begun_at - len(header)
            offset = len(header)
            for piece in file.pieces:
                places.setdefault(piece.order, []).append(Target(piece, lane, offset))
                offset += piece.size_bytes
        self._base.open(self._stack)
        return places

    def _lane(self, place: tuple[Path, OutputFile], header: bytes) -> WriteLane:
        path, file = place
        size = len(header) + sum(piece.size_bytes for piece in file.pieces)
        return WriteLane(path, header, size, self._resumed.get(path))

    def _chunks(self, places: dict[int, list[Target]]) -> Iterator[_Chunk]:
        """Yield the work in file order."""
        base_order = {order: name for order, name in enumerate(self._bound.base.tensors)}
        if self._base.hashed:
            # What is not written must be hashed all the same.
            for order in base_order:
                places.setdefault(order, [])
        for order in sorted(places):
            targets = tuple(places[order])
            name = base_order.get(order)
            made = tuple(target for target in targets if target.piece.source is not None)
            source = made[0].piece.source if made else None
            if name is not None and self._base.hashed:
                source = self._bound.base.tensors[name]
            if source is not None:
                yield from _slices(source, made, is_hashed=name is not None)
            for target in targets:
                if target.piece.source is None:
                    yield _Chunk(None, 0, 0, (target,), is_hashed=False)

    def _work(self, chunks: Iterator[_Chunk]) -> None:
        worker = _Worker(self._base, self._deltas, self.squares)
        try:
            while self._error is None:
                with self._take:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                written = worker.run(chunk)
                with self._take:
                    self._done_bytes += written
        except CancelledError:
            return
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._take:
            self._error = self._error or error
        for lane in (*self._lanes.values(), *self._base.lanes.values()):
            lane.cancel()


class _Worker:
    """One thread's buffers and its way with a chunk."""

    def __init__(
        self,
        base: BaseFiles,
        deltas: _Deltas,
        squares: dict[tuple[str, str], dict[int, Squares]],
    ) -> None:
        self._base, self._deltas, self._squares = base, deltas, squares
        self._scratch = Scratch(BLOCK)
        self._buffers: list[Array] = []

    def run(self, chunk: _Chunk) -> int:
        """Read, make and write ``chunk``; return the bytes written."""
        if chunk.source is None:
            return self._values(chunk.targets[0])
        wanted = [target for target in chunk.targets if _is_wanted(target, chunk)]
        if not wanted and not (chunk.is_hashed and self._base.hashed):
            return 0
        values = self._base.read(
            chunk.source,
            chunk.begin,
            chunk.end,
            self._buffer(0, chunk.source.dtype, chunk.end - chunk.begin, _phase(wanted, chunk)),
            is_hashed=chunk.is_hashed,
        )
        for target in wanted:
            if target.piece.is_copied:
                _put(target, chunk.begin, values)
        converted = [t for t in wanted if not t.piece.is_copied and t.piece.task is None]
        if converted:
            result = self._converted(converted[0].piece, values, _phase(converted, chunk))
            for target in converted:
                _put(target, chunk.begin, result)
        folded = [target for target in wanted if target.piece.task is not None]
        for begin in range(0, len(folded), TOGETHER):
            self._fold(folded[begin : begin + TOGETHER], values, chunk)
        if chunk.end == _count(chunk.source):
            for target in folded:
                self._deltas.forget(target.piece)
        return sum(values.size * target.piece.itemsize for target in wanted)

    def _values(self, target: Target) -> int:
        piece = target.piece
        if target.lane.begun_at >= target.offset + piece.size_bytes or piece.values is None:
            return 0
        result, finite = round_values(piece.values(), piece.dtype, self._scratch)
        if not finite:
            refuse_not_finite(piece.name, piece.dtype)
        _put(target, 0, result.reshape(-1))
        return piece.size_bytes

    def _converted(self, piece: Piece, values: Array, phase: int) -> Array:
        """Return the base's ``values`` in the piece's dtype."""
        out = self._buffer(1, piece.dtype, values.size, phase)
        finite = True
        for begin in range(0, values.size, BLOCK):
            block = slice(begin, begin + BLOCK)
            exact = self._scratch.widen(values[block])
            finite &= self._scratch.round_to(exact, piece.dtype, out[block])
        if not finite:
            refuse_not_finite(piece.name, piece.dtype)
        return out

    def _fold(self, targets: Sequence[Target], values: Array, chunk: _Chunk) -> None:
        """Fold several tasks into the base's ``values``, which are widened once for all."""
        pieces = [target.piece for target in targets]
        deltas = [self._deltas.of(piece) for piece in pieces]
        outs = [
            self._buffer(number, target.piece.dtype, values.size, _phase([target], chunk))
            for number, target in enumerate(targets, 1)
        ]
        width = pieces[0].shape[-1]
        step = max(1, BLOCK // width) * width
        if step > self._scratch.size:
            self._scratch = Scratch(step)
        for begin in range(0, values.size, step):
            end = min(begin + step, values.size)
            base = self._scratch.widen(values[begin:end])
            rows = slice((chunk.begin + begin) // width, (chunk.begin + end) // width)
            is_measured = rows.start // (step // width) % SAMPLE == 0
            for piece, delta, out in zip(pieces, deltas, outs, strict=True):
                exact = base if delta is None else delta.fold(base, rows, self._scratch)
                if not self._scratch.round_to(exact, piece.dtype, out[begin:end]):
                    task = piece.task.name if piece.task else ""
                    refuse_not_finite(f"{piece.module}, task {task}", piece.dtype)
                if is_measured and piece.task is not None:
                    squares = measure(base, exact, out[begin:end], rows.stop - rows.start)
                    key = (piece.task.name, piece.module)
                    self._squares.setdefault(key, {})[rows.start] = squares
        for target, out in zip(targets, outs, strict=True):
            _put(target, chunk.begin, out)

    def _buffer(self, number: int, dtype: str, count: int, phase: int) -> Array:
        """Return buffer ``number`` as ``count`` elements that begin ``phase`` into a page."""
        wanted = NUMPY_DTYPES[dtype]
        size = count * wanted.itemsize
        while len(self._buffers) <= number:
            self._buffers.append(np.empty(0, np.uint8))
        if self._buffers[number].nbytes < size + 2 * PAGE:
            self._buffers[number] = np.empty(max(size, CHUNK_BYTES) + 2 * PAGE, np.uint8)
        whole = self._buffers[number]
        begin = (phase - whole.ctypes.data) % PAGE
        return whole[begin : begin + size].view(wanted)


class _Deltas:
    """The factors of the layers that are being folded, computed once, by whoever comes first."""

    def __init__(self, bound: BoundModel) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int], Delta | None] = {}

    def of(self, piece: Piece) -> Delta | None:
        """Return the piece's delta, None if it is only converted."""
        if piece.task is None:
            return None
        key = (piece.module, piece.task.index)
        with self._lock:
            if key not in self._known:
                layer = self._bound.adapters.layers[piece.module]
                self._known[key] = task_delta(layer, piece.task.index)
            return self._known[key]

    def forget(self, piece: Piece) -> None:
        """Let go of the piece's delta; a thread that still needs it computes it again."""
        if piece.task is not None:
            with self._lock:
                self._known.pop((piece.module, piece.task.index), None)


def core_count() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slices(source: Tensor, targets: tuple[Target, ...], *, is_hashed: bool) -> Iterator[_Chunk]:
    """Yield ``source`` in chunks of whole rows."""
    count = _count(source)
    itemsize = NUMPY_DTYPES[source.dtype].itemsize
    is_folded = any(target.piece.task is not None for target in targets)
    row = source.shape[-1] if is_folded else 1
    rows = max(1, CHUNK_BYTES // (row * itemsize))
    whole_pages = PAGE // gcd(row * itemsize, PAGE)
    step = (rows // whole_pages * whole_pages or rows) * row
    for begin in range(0, count, step):
        yield _Chunk(source, begin, min(begin + step, count), targets, is_hashed)


def _is_wanted(target: Target, chunk: _Chunk) -> bool:
    """Return whether the target's file does not have this chunk from an earlier run."""
    return target.lane.begun_at < target.offset + chunk.end * target.piece.itemsize


def _phase(targets: Sequence[Target], chunk: _Chunk) -> int:
    """Return how far into a page of its file the first target's part of ``chunk`` begins."""
    if not targets:
        return 0
    return (targets[0].offset + chunk.begin * targets[0].piece.itemsize) % PAGE


def _put(target: Target, begin: int, values: Array) -> None:
    data = np.ascontiguousarray(values).view(np.uint8)
    offset = target.offset + begin * target.piece.itemsize
    target.lane.write(offset, data.data, data.ctypes.data)


def _count(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))
