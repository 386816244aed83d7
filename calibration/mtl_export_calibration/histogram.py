"""How often a tensor takes which magnitude: fixed memory, however many values it sees.

``BINS`` bins over [0, limit), limit a power of two. A value beyond the limit doubles it:
neighbouring bins are added up pairwise, so that nothing has to be read again and
histograms of one tensor on several tasks add exactly.
"""

from __future__ import annotations

import math

import numpy as np

from mtl_export.checkpoint.tensors import Array

BINS = 2048
# A bin of 2^-75 is narrow enough for any activation, and one over it is a float32.
_SMALLEST_EXPONENT = -64


class Histogram:
    """Magnitudes of one tensor.

    Attributes:
        counts: float64 ``[BINS]``.
        limit: Upper edge of the last bin; 0 before the first value that is not 0.
        amax: The largest magnitude seen, exactly.
    """

    def __init__(self) -> None:
        self.counts: Array = np.zeros(BINS)
        self.limit = 0.0
        self.amax = 0.0

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return self.limit / BINS

    @property
    def centers(self) -> Array:
        """Return the middle of every bin."""
        centers: Array = (np.arange(BINS) + 0.5) * self.width
        return centers

    @property
    def total(self) -> float:
        """Return how many values were seen."""
        return float(self.counts.sum())

    def add(self, values: Array) -> None:
        """Count ``values``, all finite."""
        magnitudes = np.abs(values.reshape(-1))
        if magnitudes.size == 0:
            return
        amax = float(magnitudes.max())
        self.amax = max(self.amax, amax)
        self._grow(amax)
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        # The width is a power of two, so that this product is exact.
        places = np.minimum((magnitudes * (1.0 / self.width)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)

    def merge(self, other: Histogram, weight: float = 1.0) -> None:
        """Add another histogram, its counts multiplied by ``weight``."""
        if weight <= 0.0:
            return
        self._grow(other.limit / 2)  # a limit is just above the values below it
        counts = other.counts
        limit = other.limit
        while limit and limit < self.limit:
            counts, limit = _halved(counts), limit * 2
        self.counts = self.counts + weight * counts
        self.amax = max(self.amax, other.amax)

    def _grow(self, amax: float) -> None:
        if amax <= 0.0 or amax < self.limit:
            return
        # The power of two just above.
        limit = math.ldexp(1.0, max(math.frexp(amax)[1], _SMALLEST_EXPONENT))
        if self.limit == 0.0:
            self.limit = limit
        while self.limit < limit:
            self.counts, self.limit = _halved(self.counts), self.limit * 2


def _halved(counts: Array) -> Array:
    pairs = counts.reshape(-1, 2).sum(axis=1)
    return np.concatenate([pairs, np.zeros(BINS - len(pairs))])
