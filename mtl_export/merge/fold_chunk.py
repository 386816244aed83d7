"""Make the outputs of a chunk from the base's bytes: the part of a merge that computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.merge.base_files import BaseFiles
from mtl_export.merge.chunks import Chunk, Destination, Slot
from mtl_export.merge.drift import SAMPLE, Squares, measure
from mtl_export.merge.fold import BLOCK, Delta, refuse_not_finite, task_delta
from mtl_export.merge.layout import Piece
from mtl_export.merge.rounding import Scratch


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Sums over one block of one task's layer.

    Attributes:
        task: The task's name.
        module: The layer.
        row: Its first row.
        squares: The sums.
    """

    task: str
    module: str
    row: int
    squares: Squares


class ChunkMerger:
    """One thread's or process's way of making chunks.

    Args:
        bound: The adapter and its base.
        base: The base's open files.
    """

    def __init__(self, bound: BoundModel, base: BaseFiles) -> None:
        self._bound, self._base = bound, base
        self._scratch = Scratch(BLOCK)
        self._module = ""
        self._deltas: dict[int, Delta | None] = {}

    def make(self, chunk: Chunk, batch: int, slot: Slot) -> list[BlockSums]:
        """Fill ``slot`` with a batch of the chunk's outputs; the first one reads the base.

        Raises:
            BaseModelError: A weight is not finite in its output dtype.
            OSError: The base cannot be read.
        """
        values = slot.base(chunk)
        if batch == 0 and chunk.source is not None:
            self._base.read(chunk.source, chunk.begin, chunk.end, values)
        targets, outputs = chunk.batches[batch], slot.outputs(chunk, batch)
        folded, converted = [], None
        for target, output in zip(targets, outputs, strict=True):
            if target.piece.task is not None:
                folded.append((target, output))
            elif not target.piece.is_copied:
                converted = (target.piece, output)
        if converted is not None:
            self._convert(values, *converted)
        return self._fold(chunk, values, folded) if folded else []

    def _convert(self, values: Array, piece: Piece, out: Array) -> None:
        finite = True
        for begin in range(0, values.size, BLOCK):
            block = slice(begin, begin + BLOCK)
            exact = self._scratch.widen(values[block])
            finite &= self._scratch.round_to(exact, piece.dtype, out[block])
        if not finite:
            refuse_not_finite(piece.name, piece.dtype)

    def _fold(
        self, chunk: Chunk, values: Array, folded: list[tuple[Destination, Array]]
    ) -> list[BlockSums]:
        """Fold several tasks into the base's ``values``, which are widened once for all."""
        work = [(target.piece, out, self._delta(target.piece)) for target, out in folded]
        width = folded[0][0].piece.shape[-1]
        step = max(1, BLOCK // width) * width
        if step > self._scratch.size:
            self._scratch = Scratch(step)
        measured = []
        for begin in range(0, values.size, step):
            end = min(begin + step, values.size)
            base = self._scratch.widen(values[begin:end])
            rows = slice((chunk.begin + begin) // width, (chunk.begin + end) // width)
            is_measured = rows.start // (step // width) % SAMPLE == 0
            for piece, out, delta in work:
                task = piece.task.name if piece.task else ""
                exact = base if delta is None else delta.fold(base, rows, self._scratch)
                if not self._scratch.round_to(exact, piece.dtype, out[begin:end]):
                    refuse_not_finite(f"{piece.module}, task {task}", piece.dtype)
                if is_measured:
                    squares = measure(base, exact, out[begin:end], rows.stop - rows.start)
                    measured.append(BlockSums(task, piece.module, rows.start, squares))
        return measured

    def _delta(self, piece: Piece) -> Delta | None:
        """Return the piece's delta; only those of the layer at hand are kept."""
        if piece.module != self._module:
            self._module, self._deltas = piece.module, {}
        index = piece.task.index if piece.task else 0
        if index not in self._deltas:
            layer = self._bound.adapters.layers[piece.module]
            self._deltas[index] = task_delta(layer, index)
        return self._deltas[index]


def bytes_of(values: Array) -> Array:
    """Return ``values`` as bytes, without a copy."""
    return np.ascontiguousarray(values).view(np.uint8)
