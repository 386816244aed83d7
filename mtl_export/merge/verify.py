"""Read merged files again and hold every element against base + delta.

The check shares nothing with the fold but the checkpoint: the sum is taken in float64
by the adapter's own definition, and a stored value passes if no neighbour of its dtype is
nearer to that sum (half way between two, the even one). Sums closer than
``DOUBT`` to half way are accepted on both sides: their last bit depends on the order of
summation. What no task changes must be the base's bytes, or these rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import IntegrityError, shortened
from mtl_export.merge.layout import Layout, OutputFile, Piece

# Elements compared at a time.
ROWS_OF = 1 << 20
# Relative to the magnitudes summed; a float64 sum of a few dozen products errs less.
DOUBT = 2.0**-44


def verify_task(bound: BoundModel, task: Task, layout: Layout, folder: Path, shared: Path) -> int:
    """Check the task's weight files; return how many elements were compared.

    Args:
        bound: The adapter and its base.
        task: The task.
        layout: What was to be written.
        folder: Holds the task's own files.
        shared: Holds the shared ones.

    Raises:
        IntegrityError: An element is not the nearest of its dtype.
    """
    places = [(shared, file) for file in layout.shared]
    places += [(folder, file) for file in layout.own[task.name]]
    problems: list[str] = []
    count = 0
    for place, file in places:
        for piece, wrong, size in _compared(bound, place / file.name, file):
            count += size
            if wrong:
                problems.append(f"{piece.name} ({wrong} of {size} elements)")
    if problems:
        raise IntegrityError(
            f"{folder}, task {task.name}: not base + delta: {shortened(problems)}",
            expected="every element the nearest of its dtype to the exact sum",
            fix="Run the merge again; if it happens again, check the disk and the memory",
        )
    return count


def _compared(bound: BoundModel, path: Path, file: OutputFile) -> Iterator[tuple[Piece, int, int]]:
    stored = open_safetensors(path).tensors
    for piece in file.pieces:
        size = prod(piece.shape)
        yield piece, _wrong(bound, piece, stored[piece.name]), size


def _wrong(bound: BoundModel, piece: Piece, stored: Tensor) -> int:
    """Return how many of the piece's stored elements are wrong."""
    if piece.values is not None:
        return _not_nearest(stored.numpy(), piece.values().astype(np.float64), 0.0)
    if piece.source is None:
        raise ValueError(f"{piece.name} is made from nothing")
    width = prod(piece.shape[1:])
    step = max(1, ROWS_OF // max(1, width))
    exact = _exact_rows(bound, piece)
    wrong = 0
    for begin in range(0, piece.shape[0] if piece.shape else 1, step):
        rows = slice(begin, begin + step)
        values, base = _rows(stored, rows), _rows(piece.source, rows)
        if piece.is_copied:
            wrong += int((_bits(values) != _bits(base)).sum())
        else:
            wrong += _not_nearest(values, *exact(base.astype(np.float64), rows))
    return wrong


def _exact_rows(
    bound: BoundModel, piece: Piece
) -> Callable[[Array, slice], tuple[Array, Array | float]]:
    """Return what makes of the base's rows the exact ones, and how much float64 may err."""
    if piece.task is None:
        return lambda base, rows: (base, 0.0)
    layer = bound.adapters.layers[piece.module]
    factors = layer.factors(piece.task.index)
    gain = None if layer.gain is None else layer.gain[piece.task.index]
    left, right = np.zeros((layer.out_features, 1)), np.zeros((1, layer.in_features))
    if factors is not None:
        left, right = factors.up.astype(np.float64), factors.core @ factors.down.astype(np.float64)
    if layer.transposed:
        left, right = right.T, left.T

    def exact(base: Array, rows: slice) -> tuple[Array, Array | float]:
        total = base + left[rows] @ right
        size = np.abs(base) + np.abs(left[rows]) @ np.abs(right)
        if gain is not None:
            factor = gain if layer.transposed else gain[rows, None]
            total, size = total * factor, size * np.abs(factor)
        return total, size * DOUBT

    return exact


def _rows(tensor: Tensor, rows: slice) -> Array:
    """Return some rows of ``tensor``; of one in a file, no others are read."""
    count = tensor.shape[0] if tensor.shape else 1
    width = prod(tensor.shape[1:])
    begin, end = rows.start, min(rows.stop, count)
    if tensor.file is None:
        return tensor.numpy().reshape(count, width)[begin:end]
    dtype = NUMPY_DTYPES[tensor.dtype]
    offset = tensor.offset_bytes + begin * width * dtype.itemsize
    values: Array = np.fromfile(
        tensor.file, dtype=dtype, count=(end - begin) * width, offset=offset
    )
    return values.reshape(end - begin, width)


def _not_nearest(stored: Array, exact: Array, doubt: Array | float) -> int:
    """Return for how many elements a neighbour is nearer to ``exact`` than ``stored``."""
    if stored.dtype.kind not in "fV":
        return int((stored != exact).sum())
    bits = _bits(stored)
    value = stored.astype(np.float64)
    # Towards zero and away from it: one step of the integer that the magnitude's bits are.
    one = bits.dtype.type(1)
    sign_bit = bits.dtype.type(1) << bits.dtype.type(8 * bits.itemsize - 1)
    is_zero = (bits & ~sign_bit) == 0
    away = (bits + one).view(stored.dtype).astype(np.float64)
    toward = np.where(is_zero, bits ^ sign_bit ^ one, bits - one).astype(bits.dtype)
    near = toward.view(stored.dtype).astype(np.float64)
    if stored.dtype == np.float64:
        return int((~(np.abs(value - exact) <= doubt)).sum())
    # Half ways between neighbours have one bit more than the dtype: exact in float64.
    far_middle, near_middle = (value + away) / 2, (value + near) / 2
    # Beyond the largest value lies infinity; the half way is half a step beyond.
    far_middle = np.where(np.isfinite(away), far_middle, value + (value - near) / 2)
    low, high = np.minimum(far_middle, near_middle), np.maximum(far_middle, near_middle)
    is_even = (bits & one) == 0
    inside = (exact > low - doubt) & (exact < high + doubt)
    on_edge = ((exact == low) | (exact == high)) & is_even
    return int((~(inside | on_edge)).sum())


def _bits(values: Array) -> Array:
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[values.dtype.itemsize]
    bits: Array = np.ascontiguousarray(values).view(unsigned)
    return bits
