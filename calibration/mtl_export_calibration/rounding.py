"""A weight -> the scales of its blocks, and which neighbour each weight is rounded to.

Scale of a block: of ``CUTS`` of what would keep its largest magnitude, the one with the least

    sum (w - w')^2           w' = w rounded to the nearest, cut to the format's range

Rounding: to the nearest where no rows of the input are known. Else up or down, one input
after another, the loudest first, and each one's error is made good by those that are left:

    e_i = (w_i - w'_i) / U_ii        w_j -= e_i U_ij for j after i        U^T U = H^-1
    H = X^T X + 0.1 mean(diag(X^T X)) 1

so that the product X W errs less, though single weights err more. None errs by a whole step:
that is what tells a weight that was rounded from a weight of something else.

I inputs, O outputs, X the rows [K, I].
Source: Frantar et al. 2022 (GPTQ), https://arxiv.org/abs/2210.17323, algorithm 1; that a
weight stays beside its own value, and scales before anything is made good, are ours.
"""

from __future__ import annotations

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export_calibration.formats import NumberFormat

CUTS = np.linspace(1.0, 0.7, 16)
# Of the mean energy of an input: rows are fewer than what they stand for.
DAMPING = 0.1
# Inputs whose errors are carried to all later ones in one product.
CHUNK = 64


def block_scale(values: Array, number: NumberFormat, block: int) -> Array:
    """Return float32 scales ``[I / block, O]``.

    Args:
        values: The weight, ``[I, O]``.
        number: The format.
        block: Neighbouring inputs that share a scale.
    """
    blocks = values.astype(np.float32).reshape(-1, block, values.shape[1])
    amax = np.abs(blocks).max(axis=1)
    best = number.scale(amax)
    least = np.full(best.shape, np.inf)
    for cut in CUTS:
        scale = number.scale(amax * cut)
        wide = scale[:, None, :]
        error = ((number.rounded(blocks, wide) - blocks) ** 2).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def compensated(values: Array, scale: Array, rows: Array, number: NumberFormat) -> Array:
    """Return the weight as whole numbers, int8 ``[I, O]``, rounded for what it is fed.

    Args:
        values: The weight, ``[I, O]``.
        scale: Of every weight, the same shape.
        rows: Some rows of its input, ``[K, I]``.
        number: A format of whole numbers.
    """
    wide = rows.astype(np.float64)
    hessian = wide.T @ wide
    energy = np.diag(hessian).copy()
    if not energy.any():
        return number.stored(values, scale).astype(np.int8)
    order = np.argsort(-energy, kind="stable")
    hessian[np.diag_indices_from(hessian)] += DAMPING * energy.mean()
    upper = _inverse_factor(hessian[np.ix_(order, order)])
    ratio = values.astype(np.float32)[order] / scale[order]
    low, high = (
        np.clip(beside, number.smallest, number.largest)
        for beside in (np.floor(ratio), np.ceil(ratio))
    )
    codes = np.empty(values.shape, np.int8)
    codes[order] = _in_order(ratio * scale[order], scale[order], low, high, upper)
    return codes


def _inverse_factor(hessian: Array) -> Array:
    """Return the upper triangular U, float32, with U^T U the inverse of ``hessian``."""
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    upper: Array = np.linalg.inv(factor).astype(np.float32)
    return upper


def _in_order(left: Array, scale: Array, low: Array, high: Array, upper: Array) -> Array:
    """Round one input after another; ``left`` is changed on the way."""
    codes = np.empty(left.shape, np.float32)
    for begin in range(0, len(left), CHUNK):
        end = min(begin + CHUNK, len(left))
        errors = np.zeros((end - begin, left.shape[1]), np.float32)
        for i in range(begin, end):
            codes[i] = np.clip(np.rint(left[i] / scale[i]), low[i], high[i])
            errors[i - begin] = (left[i] - codes[i] * scale[i]) / upper[i, i]
            left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - begin])
        left[end:] -= upper[begin:end, end:].T @ errors
    return codes
