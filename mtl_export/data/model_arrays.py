"""Arrays that a user gives a model -> the same, whole and within its limits, or one clear error.

A row that no runtime can compute (an id beyond the vocabulary, more tokens than positions, none
at all) would end in a traceback, or be blamed on the graph. What may be left out is filled in
here, once, so that the reference and what ships are asked the same: nothing is padding, and all
tokens are of type 0.

N rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mtl_export.checkpoint.model_inputs import (
    OFFSET_POSITIONS,
    has_position_table,
    longest_sequence,
)
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import MASK, TEXT, TOKEN_TYPES
from mtl_export.errors import CalibrationError, shortened
from mtl_export.names import INPUT_IDS


def model_arrays(
    arrays: Mapping[str, Array], config: Mapping[str, Any], reference: str
) -> dict[str, Array]:
    """Return the arrays with those that may be left out; of images, as they are.

    Args:
        arrays: By name, ``[N, ...]``, with or without ``task_ids``.
        config: Of the base model.
        reference: Where they come from, for messages.

    Raises:
        CalibrationError: One is misshaped or beyond the model's limits; every such array is
            named.
    """
    if INPUT_IDS not in arrays:
        return dict(arrays)
    _refuse(_misshaped(arrays), reference, f"whole numbers [N, S] of {', '.join(TEXT)}")
    ids = arrays[INPUT_IDS]
    found = dict(arrays)
    found.setdefault(MASK, np.ones_like(ids))
    types = int(config.get("type_vocab_size") or 0)
    if types:
        found.setdefault(TOKEN_TYPES, np.zeros_like(ids))
    limits = {INPUT_IDS: int(config.get("vocab_size") or 0), TOKEN_TYPES: types}
    problems = [
        f"{name} {int(found[name].min())} to {int(found[name].max())}, of a model with {limit}"
        for name, limit in limits.items()
        if limit and name in found and not _within(found[name], limit)
    ]
    problems += _wrong_lengths(ids, found[MASK], config)
    _refuse(problems, reference, "rows that the model can compute")
    return found


def _misshaped(arrays: Mapping[str, Array]) -> list[str]:
    shape = arrays[INPUT_IDS].shape
    return [
        f"{name} {arrays[name].dtype} {list(arrays[name].shape)}"
        for name in TEXT
        if name in arrays
        and (
            arrays[name].dtype.kind not in "iub"
            or arrays[name].shape != shape
            or arrays[name].ndim != 2
        )
    ]


def _within(values: Array, limit: int) -> bool:
    return not values.size or (int(values.min()) >= 0 and int(values.max()) < limit)


def _wrong_lengths(ids: Array, mask: Array, config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the rows' numbers of tokens."""
    used = mask != 0
    counts = used.sum(axis=1)
    if not len(counts) or not counts.min():
        return [f"row {int(np.argmin(counts)) + 1} has no token" if len(counts) else "no row"]
    if not has_position_table(config):
        return []
    # Batches are cut where no row has a token; padding before one takes positions, except where
    # they are counted from the tokens.
    longest = int(np.flatnonzero(used.any(axis=0)).max()) + 1
    if config.get("model_type") in OFFSET_POSITIONS:
        longest = int((ids != int(config.get("pad_token_id") or 0)).sum(axis=1).max())
    positions = longest_sequence(config)
    return [f"{longest} tokens, of a model with {positions} positions"] * (longest > positions)


def _refuse(problems: list[str], reference: str, expected: str) -> None:
    if problems:
        raise CalibrationError(
            f"{reference}: {shortened(problems)}",
            expected=f"{expected}, because no runtime can compute anything else",
            fix="Correct these rows",
        )
