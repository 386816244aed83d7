"""Rows of different length -> the arrays that a graph takes, and back.

    [[5, 9, 7], [5, 3]]  ->  input_ids [[5, 9, 7], [5, 3, PAD]]
                             attention_mask [[1, 1, 1], [1, 1, 0]]

B rows, S tokens of the longest. Only what a mask can leave out is padded: a dimension that no mask
has, such as an image's height, is the same in every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.errors import UsageError, shortened
from mtl_export.names import ATTENTION_MASK, INPUT_IDS
from mtl_export.runtime.arguments import listed

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

TOKEN_TYPES = "token_type_ids"
# What a graph looks up in tables.
IDS = frozenset({INPUT_IDS, TOKEN_TYPES})
SEQUENCE, MASK = "sequence", "mask"
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
class RowBatch:
    """The inputs of one call, row by row.

    Attributes:
        fields: The graph's inputs, without ``task_ids``.
        values: By input, one array for each row.
        sizes: Of each row, its named dimensions; ``sequence`` is its tokens.
        padding: By input, what fills the rows up; 0 where nothing is said.
    """

    fields: tuple[Field, ...]
    values: Mapping[str, list[Array]]
    sizes: tuple[Mapping[str, int], ...]
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
    placed_by: str = "",
) -> RowBatch:
    """Return ``inputs`` as rows that the graph takes.

    Args:
        inputs: By name, an array or a sequence of rows. A missing attention mask is ones, missing
            token types are zeros.
        fields: The graph's inputs, without ``task_ids``.
        pad_token_id: Fills ``input_ids``.
        where: The graph, for messages.
        longest: Most tokens that a row may have; None: no limit.
        placed_by: The input whose padding takes no position and does not count: ``input_ids``
            or ``attention_mask``; "": all of a row counts.

    Raises:
        UsageError: ``inputs`` are not by name, or one is unknown, missing, empty, of another
            type or shape, a row is too long, or an id is negative.
    """
    known = {field.name: field for field in fields}
    given = _given(inputs, known, where)
    unknown = [name for name in inputs if name not in known]
    derived = _derived(given, known)
    missing = [name for name in known if name not in given and name not in derived]
    problems = [f"{name} is no input" for name in unknown]
    problems += [f"{name} is missing" for name in missing]
    rows = {**given, **derived}
    problems += _misfits(given, known)
    if not problems:
        problems = _uneven(rows, known) or _unlike(rows, known)
    if not problems and longest is not None and INPUT_IDS in rows:
        problems = _too_long(rows, placed_by, pad_token_id, longest)
    if problems:
        raise _refused(problems, known, where)
    count = len(next(iter(rows.values()), []))
    sizes = tuple(_sizes(rows, known, number) for number in range(count))
    own = tuple({dim: found[0][1] for dim, found in one.items()} for one in sizes)
    return RowBatch(tuple(fields), rows, own, {INPUT_IDS: pad_token_id})


def _refused(problems: Sequence[str], known: Mapping[str, Field], where: str) -> UsageError:
    return UsageError(
        f"{where}: {shortened(problems)}",
        expected=f"{', '.join(known)}, each with one entry per row",
        fix="Give exactly these; attention_mask and token_type_ids may be left out",
    )


def _given(
    inputs: Mapping[str, Any], known: Mapping[str, Field], where: str
) -> dict[str, list[Array]]:
    """Return the inputs that are known, row by row."""
    if not isinstance(inputs, Mapping):
        raise _refused([f"{type(inputs).__name__} in place of inputs by name"], known, where)
    entries = {name: listed(inputs[name]) for name in inputs if name in known}
    problems = [
        f"{name} is {type(inputs[name]).__name__}, not rows"
        for name, rows in entries.items()
        if rows is None
    ]
    if problems:
        raise _refused(problems, known, where)
    return {name: [_row(known[name], row) for row in rows or ()] for name, rows in entries.items()}


def _row(field: Field, values: Any) -> Array:
    """Return a row in the graph's dtype; one of another kind stays as it is, to be refused."""
    wanted = np.dtype(field.dtype)
    try:
        row = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # numpy's and torch's words for no array
        return np.empty((), np.object_)
    allowed = "biu" if wanted.kind in "biu" else "biuf"
    return row.astype(wanted) if row.dtype.kind in allowed else row


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
    if counts and min(counts.values()) == 0:
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
    wanted, dims = np.dtype(field.dtype), field.dims[1:]
    if row.dtype.kind == "O":
        return f"is no array, or its numbers are too large for {wanted.name} {list(dims)}"
    if row.ndim == len(dims) and not row.size:
        return "has no tokens" if field.is_sequence else "is empty"
    fits = row.ndim == len(dims) and all(
        size == dim for size, dim in zip(row.shape, dims, strict=True) if isinstance(dim, int)
    )
    if row.dtype != wanted or not fits:
        return f"is {row.dtype.name} {list(row.shape)}, not {wanted.name} {list(dims)}"
    # A graph's Gather counts negative ids from the table's end: an answer like any other.
    if field.name in IDS and row.min() < 0:
        return f"holds {row.min()}, and ids are 0 or more"
    if field.name.endswith(MASK) and wanted.kind != "f" and ((row != 0) & (row != 1)).any():
        return f"holds {row[(row != 0) & (row != 1)][0]}, and a mask is 0 or 1"
    return ""


def _sizes(
    rows: Mapping[str, list[Array]], known: Mapping[str, Field], number: int
) -> dict[str, list[tuple[str, int]]]:
    """Return the sizes of one row's named dimensions, and the inputs that have them."""
    sizes: dict[str, list[tuple[str, int]]] = {}
    for name, values in rows.items():
        for dim, size in zip(known[name].dims[1:], values[number].shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, []).append((name, size))
    return sizes


def _uneven(rows: Mapping[str, list[Array]], known: Mapping[str, Field]) -> list[str]:
    """Return which rows have a dimension of one name in several sizes."""
    return [
        f"row {number} has {dim} " + ", ".join(f"{size} in {name}" for name, size in found)
        for number in range(len(next(iter(rows.values()))))
        for dim, found in _sizes(rows, known, number).items()
        if len({size for _, size in found}) > 1
    ]


def _unlike(rows: Mapping[str, list[Array]], known: Mapping[str, Field]) -> list[str]:
    """Return which rows differ from the first where no mask could say what is padding."""
    masked = {dim for name in rows if name.endswith(MASK) for dim in known[name].dims[1:]}
    return [
        f"row {number} of {name} is {list(row.shape)}, and row 0 is {list(values[0].shape)}"
        for name, values in rows.items()
        for number, row in enumerate(values)
        if any(
            size != first and dim not in masked
            for dim, size, first in zip(
                known[name].dims[1:], row.shape, values[0].shape, strict=True
            )
        )
    ]


def _too_long(
    rows: Mapping[str, list[Array]], placed_by: str, pad_token_id: int, longest: int
) -> list[str]:
    """Return which rows the model has no positions for."""
    padding = {INPUT_IDS: pad_token_id, ATTENTION_MASK: 0}
    name = placed_by if placed_by in rows else INPUT_IDS
    problems = []
    for number, row in enumerate(rows[name]):
        tokens = int((row != padding[name]).sum())
        more = 0 if placed_by else len(row) - tokens
        if tokens + more > longest:
            beside = f" and {more} of padding" if more else ""
            problems.append(
                f"row {number} has {tokens} tokens{beside}, and the model takes at most {longest}"
            )
    return problems


def _padded(rows: Sequence[Array], fill: int) -> Array:
    shape = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    padded = np.full((len(rows), *shape), fill, rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[tuple(slice(size) for size in row.shape)] = row
    return padded


def own_part(
    value: Array, field: Field, sizes: Mapping[str, int], counted: Mapping[str, Array]
) -> Array:
    """Return one row's output without padding.

    Args:
        value: ``[...]``, as the batch gave it.
        field: The output.
        sizes: The row's named dimensions.
        counted: By dimension that is none of these, such as ``regions + sequence``: a mask, 0
            for padding.
    """
    for axis, dim in enumerate(field.dims[1:]):
        if dim in counted:
            value = np.compress(counted[str(dim)] != 0, value, axis)
        elif dim in sizes:
            value = value[(slice(None),) * axis + (slice(sizes[str(dim)]),)]
    return value


def joined(parts: Sequence[tuple[Sequence[int], Array]]) -> Array:
    """Return the outputs of several batches as one, rows in order, shorter ones padded with 0.

    Args:
        parts: Row numbers and their ``[len(rows), ...]``.
    """
    order = np.argsort([row for rows, _ in parts for row in rows])
    if len(parts) == 1:
        return parts[0][1][order]
    return _padded([value for _, values in parts for value in values], 0)[order]
