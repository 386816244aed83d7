"""Keep what tells most: the amax that loses least information, as TensorRT's calibrator did.

For every candidate, the first i bins: P is their distribution with all beyond i added to
the last bin; Q is what is left of the first i bins once those that the format maps to one
number share their mass evenly (empty bins stay empty). The amax of the smallest
KL(P || Q) is taken.

Source: Migacz, "8-bit inference with TensorRT", GTC 2017, slides 25-28, of which this is
the form for any set of numbers, not only evenly spaced ones.
"""

from __future__ import annotations

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import BINS, Histogram

# TensorRT starts at as many bins as int8 has magnitudes; every eighth is tried after that.
FIRST, STRIDE = 128, 8
# Mass of P where Q has none would make the divergence infinite.
EPSILON = 1e-9


def entropy_amax(histogram: Histogram, number: NumberFormat) -> float:
    """Return the candidate with the smallest divergence; of equals, the smallest."""
    filled = np.flatnonzero(histogram.counts)
    if histogram.limit == 0.0 or not len(filled):
        return histogram.amax
    last = min(int(filled[-1]) + 1, BINS)
    edges = [*range(FIRST, last, STRIDE), last]
    divergences = [_divergence(histogram, number, edge) for edge in edges]
    edge: int = edges[int(np.argmin(divergences))]
    return min(edge * histogram.width, histogram.amax)


def _divergence(histogram: Histogram, number: NumberFormat, edge: int) -> float:
    kept = histogram.counts[:edge]
    reference = kept.copy()
    reference[-1] += histogram.counts[edge:].sum()
    scale = number.scale(np.array(edge * histogram.width))
    levels = number.rounded(histogram.centers[:edge], scale)
    candidate = _shared(kept, levels)
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), EPSILON)
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], EPSILON))).sum())


def _shared(counts: Array, levels: Array) -> Array:
    """Return ``counts`` shared evenly among the filled bins of each level."""
    _, group = np.unique(levels, return_inverse=True)
    mass = np.bincount(group, weights=counts)
    filled = np.bincount(group, weights=counts > 0)
    share = np.divide(mass, filled, out=np.zeros_like(mass), where=filled > 0)
    result: Array = np.where(counts > 0, share[group], 0.0)
    return result
