"""The pass over the base, cut into chunks of a few megabytes, and the memory they go through.

A chunk is made in batches of a few tasks, so that the memory for its outputs is bounded
whatever the number of tasks. Memory is shared with worker processes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.merge.hashed_files import PAGE, HashedOutput
from mtl_export.merge.layout import Piece

CHUNK_BYTES = 1 << 20
# How many outputs are made from one reading; bounds a slot's memory.
TOGETHER = 8
# Buffers of a slot: the base's bytes, these converted, and each folded output.
_BASE, _CONVERTED, _FOLDED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one piece goes.

    Attributes:
        piece: The piece.
        output: Its file.
        offset: Where in it.
    """

    piece: Piece
    output: HashedOutput
    offset: int

    def place(self, begin: int) -> int:
        """Return where in the file element ``begin`` of the piece goes."""
        return self.offset + begin * self.piece.itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive elements of one base tensor, or one value of the checkpoint.

    Attributes:
        source: The base tensor; None for a value.
        begin: First element.
        end: Behind the last.
        batches: Where they go, a few targets at a time; at least one batch, maybe empty.
        is_hashed: Whether this reading counts for the base's hash.
    """

    source: Tensor | None
    begin: int
    end: int
    batches: tuple[tuple[Destination, ...], ...]
    is_hashed: bool = False

    @property
    def count(self) -> int:
        """Return how many elements it has."""
        return self.end - self.begin


class Slot:
    """Buffers for one chunk at a time; worker processes that are forked later share them.

    Args:
        buffers: How many.
        size_bytes: Of each.
    """

    def __init__(self, buffers: int, size_bytes: int) -> None:
        self._stride = (-(-size_bytes // PAGE) + 1) * PAGE
        self._memory = np.frombuffer(mmap.mmap(-1, buffers * self._stride), np.uint8)

    def base(self, chunk: Chunk) -> Array:
        """Return where the base's elements are, in the base's dtype."""
        if chunk.source is None:
            raise ValueError("a value has no base")
        copied = [t for t in chunk.batches[0] if t.piece.is_copied]
        phase = copied[0].place(chunk.begin) if copied else 0
        return self._array(_BASE, chunk.source.dtype, chunk.count, phase)

    def outputs(self, chunk: Chunk, batch: int) -> list[Array]:
        """Return where the elements of each target of a batch are, in its dtype.

        What is copied is the base's own array, and what is converted is made once for all.
        """
        found = []
        for number, target in enumerate(chunk.batches[batch], _FOLDED):
            piece = target.piece
            if piece.is_copied:
                found.append(self.base(chunk))
            elif piece.task is None:
                first = next(t for t in chunk.batches[batch] if t.piece.task is None)
                phase = first.place(chunk.begin)
                found.append(self._array(_CONVERTED, piece.dtype, chunk.count, phase))
            else:
                phase = target.place(chunk.begin)
                found.append(self._array(number, piece.dtype, chunk.count, phase))
        return found

    def _array(self, number: int, dtype: str, count: int, phase: int) -> Array:
        """Return ``count`` elements that begin as far into a page as ``phase``."""
        wanted = NUMPY_DTYPES[dtype]
        begin = number * self._stride + phase % PAGE
        return self._memory[begin : begin + count * wanted.itemsize].view(wanted)


def slot_for(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Return how many buffers the largest of ``chunks`` needs, and of how many bytes."""
    buffers, size = _FOLDED, CHUNK_BYTES
    for chunk in chunks:
        if chunk.source is not None:
            buffers = max(buffers, _FOLDED + max(len(batch) for batch in chunk.batches))
            itemsizes = [t.piece.itemsize for batch in chunk.batches for t in batch]
            itemsizes.append(NUMPY_DTYPES[chunk.source.dtype].itemsize)
            size = max(size, chunk.count * max(itemsizes))
    return buffers, size


def chunks_of(
    bound: BoundModel, places: Mapping[int, Sequence[Destination]], *, hash_base: bool
) -> Iterator[Chunk]:
    """Yield the work in file order, without what an earlier run has done.

    Args:
        bound: Its base is what is read.
        places: Where pieces go, by their order.
        hash_base: Read all of the base, also what goes nowhere.
    """
    base = dict(enumerate(bound.base.tensors.values()))
    for order in sorted({*places, *(base if hash_base else ())}):
        targets = places.get(order, ())
        made = tuple(target for target in targets if target.piece.source is not None)
        source = made[0].piece.source if made else None
        if hash_base and order in base:
            source = base[order]
        if source is not None:
            yield from _slices(source, made, is_hashed=hash_base and order in base)
        for target in targets:
            done = target.output.begun_at >= target.place(prod(target.piece.shape))
            if target.piece.source is None and not done:
                yield Chunk(None, 0, 0, ((target,),))


def _slices(
    source: Tensor, targets: tuple[Destination, ...], *, is_hashed: bool
) -> Iterator[Chunk]:
    """Yield ``source`` in chunks of whole rows, and where it can be of whole pages."""
    count = prod(source.shape)
    itemsize = NUMPY_DTYPES[source.dtype].itemsize
    is_folded = any(target.piece.task is not None for target in targets)
    row = source.shape[-1] if is_folded else 1
    rows = max(1, CHUNK_BYTES // (row * itemsize))
    whole_pages = PAGE // gcd(row * itemsize, PAGE)
    step = (rows // whole_pages * whole_pages or rows) * row
    for begin in range(0, count, step):
        end = min(begin + step, count)
        wanted = [t for t in targets if t.output.begun_at < t.place(end)]
        if wanted or is_hashed:
            batches = [tuple(wanted[n : n + TOGETHER]) for n in range(0, len(wanted), TOGETHER)]
            yield Chunk(source, begin, end, tuple(batches) or ((),), is_hashed)
