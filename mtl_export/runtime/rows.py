"""Rows of different length -> the arrays that a graph takes, and back.

    [[5, 9, 7], [5, 3]]  ->  input_ids [[5, 9, 7], [5, 3, PAD]]
                             attention_mask [[1, 1, 1], [1, 1, 0]]

B rows, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.errors import EngineRunError, shortened

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

INPUT_IDS, ATTENTION_MASK, TOKEN_TYPES = "input_ids", "attention_mask", "token_type_ids"
TASK_IDS = "task_ids"
# What a graph looks up in tables.
IDS = frozenset({INPUT_IDS, TOKEN_TYPES})
SEQUENCE = "sequence"
# ONNX Runtime's words for what numpy can hold.
_DTYPES = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """One input or output of a graph.

    Attributes:
        name: Its name.
        dims: A number or the name of each dimension; ``batch`` comes first.
        dtype: numpy's name of its element type.
    """

    name: str
    dims: tuple[int | str | None, ...]
    dtype: str

    @property
    def is_batched(self) -> bool:
        """Whether it has one entry for each row; a task for the whole batch is ``[1]``."""
        return bool(self.dims) and not isinstance(self.dims[0], int)

    @property
    def is_sequence(self) -> bool:
        """Whether it has one value for each token: ``[batch, sequence]``."""
        return len(self.dims) == 2 and self.dims[1] == SEQUENCE


def fields_of(values: Sequence[Any]) -> tuple[Field, ...]:
    """Return ``session.get_inputs()`` or ``get_outputs()`` as our records."""
    return tuple(
        Field(value.name, tuple(value.shape), np.dtype(_DTYPES.get(value.type, np.float32)).name)
        for value in values
    )


@dataclass(frozen=True)
class Rows:
    """The inputs of one call, row by row.

    Attributes:
        fields: The graph's inputs, without ``task_ids``.
        values: By input, one array for each row.
        lengths: Tokens of each row; empty for a model that takes no tokens.
        padding: By input, what fills the rows up; 0 where nothing is said.
    """

    fields: tuple[Field, ...]
    values: Mapping[str, list[Array]]
    lengths: tuple[int, ...]
    padding: Mapping[str, int]

    @property
    def count(self) -> int:
        """Return how many rows there are."""
        return len(next(iter(self.values.values()), []))

    def batch(self, chosen: Sequence[int]) -> dict[str, Array]:
        """Return the arrays of the rows ``chosen``, padded to the longest of them."""
        return {
            name: _padded([values[row] for row in chosen], self.padding.get(name, 0))
            for name, values in self.values.items()
        }


def rows_from(
    inputs: Mapping[str, Any],
    fields: Sequence[Field],
    *,
    pad_token_id: int,
    where: str,
    longest: int | None = None,
) -> Rows:
    """Return ``inputs`` as rows that the graph takes.

    Args:
        inputs: By name, an array or a sequence of rows. A missing attention mask is ones, missing
            token types are zeros.
        fields: The graph's inputs, without ``task_ids``.
        pad_token_id: Fills ``input_ids``.
        where: The graph, for messages.
        longest: Most tokens that a row may have, padding not counted; None: no limit.

    Raises:
        EngineRunError: An input is unknown, missing, empty, of another type or length, a row
            is too long, or an id is negative.
    """
    known = {field.name: field for field in fields}
    unknown = [name for name in inputs if name not in known]
    given = {name: _rows(known[name], inputs[name]) for name in inputs if name in known}
    derived = _derived(given, known)
    missing = [name for name in known if name not in given and name not in derived]
    problems = [f"{name} is no input" for name in unknown]
    problems += [f"{name} is missing" for name in missing]
    rows = {**given, **derived}
    problems += _misfits(given, known) or _uneven(rows, known)
    if not problems and longest is not None and INPUT_IDS in rows:
        problems = _too_long(rows[INPUT_IDS], pad_token_id, longest)
    if problems:
        raise EngineRunError(
            where=where,
            found=shortened(problems),
            expected=f"{', '.join(known)}, each with one entry per row",
            fix="Give exactly these; attention_mask and token_type_ids may be left out",
        )
    tokens = next((name for name in rows if known[name].is_sequence), None)
    lengths = tuple(len(row) for row in rows[tokens]) if tokens else ()
    return Rows(tuple(fields), rows, lengths, {INPUT_IDS: pad_token_id})


def _rows(field: Field, values: Any) -> list[Array]:
    """Return each row in the graph's dtype; one of another kind stays as it is, to be refused."""
    wanted = np.dtype(field.dtype)
    arrays = [np.asarray(row) for row in values]
    allowed = "biu" if wanted.kind in "biu" else "biuf"
    return [row.astype(wanted) if row.dtype.kind in allowed else row for row in arrays]


def _derived(
    given: Mapping[str, list[Array]], known: Mapping[str, Field]
) -> dict[str, list[Array]]:
    if INPUT_IDS not in given:
        return {}
    fills = {ATTENTION_MASK: 1, TOKEN_TYPES: 0}
    return {
        name: [np.full(row.shape, fill, known[name].dtype) for row in given[INPUT_IDS]]
        for name, fill in fills.items()
        if name in known and name not in given
    }


def _misfits(given: Mapping[str, list[Array]], known: Mapping[str, Field]) -> list[str]:
    """Return what is wrong with single rows of what was given, or with how many there are."""
    counts = {name: len(values) for name, values in given.items()}
    if not counts or min(counts.values()) == 0:
        return ["no rows"]
    if len(set(counts.values())) > 1:
        return [f"{name} has {count} rows" for name, count in counts.items()]
    misfits = (
        (f"row {number} of {name}", _misfit(row, known[name]))
        for name, values in given.items()
        for number, row in enumerate(values)
    )
    return [f"{row} {misfit}" for row, misfit in misfits if misfit]


def _misfit(row: Array, field: Field) -> str:
    wanted = np.dtype(field.dtype)
    if row.ndim == len(field.dims) - 1 and not row.size:
        return "has no tokens" if field.is_sequence else "is empty"
    if row.dtype != wanted or row.ndim != len(field.dims) - 1:
        return f"is {row.dtype.name} {list(row.shape)}, not {wanted.name} {list(field.dims[1:])}"
    # A graph's Gather counts negative ids from the table's end: an answer like any other.
    if field.name in IDS and row.min() < 0:
        return f"holds {row.min()}, and ids are 0 or more"
    return ""


def _uneven(rows: Mapping[str, list[Array]], known: Mapping[str, Field]) -> list[str]:
    problems = []
    tokens = [name for name in rows if known[name].is_sequence]
    for number in range(len(rows[tokens[0]]) if tokens else 0):
        lengths = {name: len(rows[name][number]) for name in tokens}
        if len(set(lengths.values())) > 1:
            problems.append(f"row {number} has {lengths} values")
    return problems


def _too_long(rows: Sequence[Array], pad_token_id: int, longest: int) -> list[str]:
    """Return which rows the model has no positions for; padding may take none."""
    counts = [int((row != pad_token_id).sum()) for row in rows]
    return [
        f"row {number} has {count} tokens, and the model takes at most {longest}"
        for number, count in enumerate(counts)
        if count > longest
    ]


def _padded(rows: Sequence[Array], fill: int) -> Array:
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    padded = np.full((len(rows), *shape), fill, rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[tuple(slice(size) for size in row.shape)] = row
    return padded


def own_part(value: Array, field: Field, length: int | None) -> Array:
    """Return one row's output without the padding of its sequence dimensions."""
    if length is None:
        return value
    cut = tuple(slice(length if dim == SEQUENCE else None) for dim in field.dims[1:])
    return value[cut]


def joined(parts: Sequence[tuple[Sequence[int], Array]]) -> Array:
    """Return the outputs of several batches as one, rows in order, shorter ones padded with 0.

    Args:
        parts: Row numbers and their ``[len(rows), ...]``.
    """
    order = np.argsort([row for rows, _ in parts for row in rows])
    if len(parts) == 1:
        return parts[0][1][order]
    return _padded([value for _, values in parts for value in values], 0)[order]
