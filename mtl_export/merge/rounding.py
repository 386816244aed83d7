"""float64 sums into an output dtype, each rounded once, in blocks that stay in the cache.

Nearest, ties to even. numpy casts float64 to float32 and float16 so. bfloat16 is
reached from float32 in integers: add half a unit of the last kept bit, drop 16 bits.
That goes wrong only where the float32 lies exactly half way between two bfloat16
(low bits 0x8000, one element in 65536), and these few are decided by the float64.
``ml_dtypes`` casts float64 by way of float32 and rounds twice.
"""

from __future__ import annotations

import numpy as np

from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array

_HALF = np.uint32(0x8000)
_UNIT = np.uint32(0x10000)
# So many ties of a block are found one by one, by numpy's fastest search; the rest together.
FEW_TIES = 4
# The smallest value that no longer rounds to a finite one: half a unit beyond the largest.
_LIMITS = {
    "BF16": float(np.uint32(0x7F7F8000).view(np.float32)),
    "F16": 65520.0,
    "F32": float(2.0**128 - 2.0**103),
    "F64": float("inf"),
}


class Scratch:
    """One thread's work space for blocks of up to ``size`` elements.

    Args:
        size: Elements; every array below has as many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.base = _apart(size, np.float64, 0)
        self.total = _apart(size, np.float64, 1)
        self._single = _apart(size, np.float32, 2)
        self._low = _apart(size, np.uint16, 3)
        # Whole words of eight, so that a word without a tie is passed over at once.
        self._ties = np.zeros(-(-size // 8) * 8, np.bool_)

    def widen(self, values: Array) -> Array:
        """Return ``values``, flat and of any floating dtype, as float64 in ``base``."""
        wide: Array = self.base[: values.size]
        if values.dtype in (np.float64, np.float32):
            np.copyto(wide, values)
        else:
            single = self._single[: values.size]
            np.copyto(single, values, casting="unsafe")
            np.copyto(wide, single)
        return wide

    def round_to(self, exact: Array, dtype: str, out: Array) -> bool:
        """Round flat float64 ``exact`` into ``out``; return whether all of it is finite.

        Args:
            exact: At most ``size`` elements.
            dtype: Output dtype: F64, F32, F16 or BF16.
            out: As many elements of that dtype.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if dtype == "BF16":
                return self._round_to_bfloat16(exact, out.view(np.uint16))
            np.copyto(out, exact, casting="same_kind")
            return _is_below(_LIMITS[dtype], exact)

    def _round_to_bfloat16(self, exact: Array, out: Array) -> bool:
        single, low = self._single[: exact.size], self._low[: exact.size]
        bits = single.view(np.uint32)
        np.copyto(single, exact, casting="same_kind")
        finite = _is_below(_LIMITS["BF16"], single)
        np.add(bits, _HALF, out=bits)
        np.copyto(low, bits, casting="unsafe")
        self._settle_all_ties(low, exact, bits)
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")
        return finite

    def _settle_all_ties(self, low: Array, exact: Array, bits: Array) -> None:
        """Settle every element whose ``low`` is 0, most often one or none in a block."""
        begin = 0
        for _ in range(FEW_TIES):
            if begin == low.size:
                return
            begin += int(low[begin:].argmin())
            if low[begin]:
                return
            _settle_tie(begin, exact, bits)
            begin += 1
        rest = slice(begin, None)
        _settle_ties(self._places_of_zeros(low[rest]), exact[rest], bits[rest])

    def _places_of_zeros(self, values: Array) -> Array:
        """Return where ``values`` are 0; numpy's own search takes longer than the rounding."""
        words = -(-values.size // 8)
        marks = self._ties[: 8 * words]
        np.equal(values, 0, out=marks[: values.size])
        marks[values.size :] = False
        found = np.flatnonzero(marks.view(np.uint64) != 0)
        within, bit = np.nonzero(marks.reshape(words, 8)[found])
        places: Array = found[within] * 8 + bit
        return places


def _apart(size: int, dtype: type[np.generic], number: int) -> Array:
    """Return an array that begins elsewhere in its page than those of other ``number``.

    Large arrays all begin at the same place in a page, and a processor that reads one while
    it writes another takes addresses that are equal modulo a page for the same.
    """
    skipped = number * 1088 // np.dtype(dtype).itemsize
    whole: Array = np.empty(size + skipped, dtype)
    return whole[skipped:]


def _is_below(limit: float, values: Array) -> bool:
    """Return whether every magnitude is below ``limit``; NaN is not."""
    if not values.size:
        return True
    # One pass settles almost every block: no magnitude exceeds the root of the sum of
    # squares, and a comparison with NaN is false. max and min hand NaN on as well.
    if np.dot(values, values) < min(limit * limit, float(np.finfo(values.dtype).max)):
        return True
    return bool(values.max() < limit) and bool(values.min() > -limit)


def _settle_tie(place: int, exact: Array, bits: Array) -> None:
    """Do what ``_settle_ties`` does for one element, without the calls that arrays take."""
    up = bits[place]
    middle = abs(float((up - _HALF).view(np.float32)))
    size = abs(float(exact[place]))
    if size < middle or (size == middle and up // _UNIT % 2 == 1):
        bits[place] = up - _UNIT


def _settle_ties(ties: Array, exact: Array, bits: Array) -> None:
    """Take back the rounding up of those ``ties`` that float64 or evenness sends down.

    Args:
        ties: Where the float32 was half way between two bfloat16.
        exact: The float64 it came from.
        bits: The float32's bits after half a unit was added; changed in place.
    """
    up = bits[ties]
    middle = np.abs((up - _HALF).view(np.float32).astype(np.float64))
    size = np.abs(exact[ties])
    is_odd = (up // _UNIT) % 2 == 1
    down = (size < middle) | ((size == middle) & is_odd)
    bits[ties[down]] -= _UNIT


def round_values(values: Array, dtype: str, scratch: Scratch) -> tuple[Array, bool]:
    """Return ``values`` in ``dtype``, each rounded once, and whether all of it is finite."""
    flat = np.ascontiguousarray(values).reshape(-1)
    out: Array = np.empty(flat.size, NUMPY_DTYPES[dtype])
    finite = True
    for begin in range(0, flat.size, scratch.size):
        block = slice(begin, begin + scratch.size)
        finite &= scratch.round_to(scratch.widen(flat[block]), dtype, out[block])
    return out.reshape(values.shape), finite
