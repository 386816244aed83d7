"""Which tensor of which task goes to which output file, at which offset.

Decided from names and shapes alone, before a byte is read. The order of tensors is the
base's, so that one pass over the base in file order writes every output in file order.

Own files are those of one task; shared files hold tensors that no task changes and are
stored once for all. Files keep the base's shards and their names, unless a size limit
cuts them anew or sharing takes them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import Rows
from mtl_export.checkpoint.base_model import SINGLE_FILE
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import UsageError
from mtl_export.merge.hashed_files import DIRECT_BYTES, PAGE

# --dtype word -> (safetensors dtype, transformers config dtype)
DTYPES = {
    "fp32": ("F32", "float32"),
    "fp16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
}
MergeLayout = Literal["standalone", "shared"]
# Where shared tensors are cut into files if the base itself is one: transformers' own habit
# before version 5, and what most readers of large models expect.
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of an output file.

    Attributes:
        name: Its name in the model class.
        dtype: As it is written.
        shape: As it is written.
        source: The base tensor it is made from; None for a value of the checkpoint.
        values: Gives the checkpoint's own values; None for what comes from the base.
        task: The task whose delta is folded in; None where there is none.
        module: The adapted layer, where ``task`` is given.
        order: Its place in the pass, the same for all tasks; rises within every file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor | None
    values: Callable[[], Array] | None = None
    task: Task | None = None
    module: str = ""
    order: int = 0

    @property
    def itemsize(self) -> int:
        """Return the bytes of one element."""
        return NUMPY_DTYPES[self.dtype].itemsize

    @property
    def size_bytes(self) -> int:
        """Return its size on disk."""
        return prod(self.shape) * self.itemsize

    @property
    def is_copied(self) -> bool:
        """Return whether the base's bytes are its bytes."""
        return self.source is not None and self.task is None and self.source.dtype == self.dtype


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write.

    Attributes:
        name: File name.
        pieces: Its tensors, in file order.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of the whole file."""
        return len(self.header()) + sum(piece.size_bytes for piece in self.pieces)

    def header(self) -> bytes:
        """Return everything before the first tensor (see ``checkpoint.safetensors``)."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for piece in self.pieces:
            entries[piece.name] = {
                "dtype": piece.dtype,
                "shape": list(piece.shape),
                "data_offsets": [offset, offset + piece.size_bytes],
            }
            offset += piece.size_bytes
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        # The format wants the data to start on a multiple of 8 bytes; large files are written
        # in pages, which is cheapest if tensors begin with one.
        step = PAGE if offset >= DIRECT_BYTES else 8
        encoded += b" " * (-(8 + len(encoded)) % step)
        return len(encoded).to_bytes(8, "little") + encoded


@dataclass(frozen=True)
class Layout:
    """All files of one merge.

    Attributes:
        own: By task name, in id order.
        shared: Stored once for all tasks; empty for standalone models.
    """

    own: Mapping[str, tuple[OutputFile, ...]]
    shared: tuple[OutputFile, ...]

    @property
    def size_bytes(self) -> int:
        """Return what all of it takes on disk."""
        own = sum(file.size_bytes for files in self.own.values() for file in files)
        return own + sum(file.size_bytes for file in self.shared)

    def index(self, task: Task, shared_folder: str = "") -> dict[str, object] | None:
        """Return the task's shard index, None where one file holds it all.

        Args:
            task: The task.
            shared_folder: Where the shared files lie, seen from the task's folder.
        """
        own = self.own[task.name]
        if not self.shared and [file.name for file in own] == [SINGLE_FILE]:
            return None
        placed = [(f"{shared_folder}{file.name}", file) for file in self.shared]
        placed += [(file.name, file) for file in own]
        weight_map = {piece.name: path for path, file in placed for piece in file.pieces}
        size = sum(piece.size_bytes for _, file in placed for piece in file.pieces)
        return {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }


Group = tuple[str, list[Piece]]


def merge_layout(
    bound: BoundModel,
    tasks: Sequence[Task],
    *,
    dtype: str | None = None,
    layout: MergeLayout = "standalone",
    max_shard_bytes: int | None = None,
) -> Layout:
    """Return the files that hold ``tasks``.

    Args:
        bound: The adapter and its base.
        tasks: The tasks to fold, in id order.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None keeps each tensor's own.
        layout: ``shared`` stores tensors that none of ``tasks`` changes once.
        max_shard_bytes: Cut files at this size of tensor data; None keeps the base's files.
    """
    by_task = {task.name: _pieces(bound, task, dtype) for task in tasks}
    common = _common(by_task) if layout == "shared" else frozenset()
    keeps = not common and max_shard_bytes is None
    shared, own = _groups(bound, by_task, common, max_shard_bytes, keeps=keeps)
    if not _are_aligned([shared, *own.values()]):
        by_task = {name: _largest_items_first(pieces) for name, pieces in by_task.items()}
        shared, own = _groups(bound, by_task, common, max_shard_bytes, keeps=keeps)
    total = len(shared) + max(len(files) for files in own.values())
    return Layout(
        own={name: _named(files, len(shared), total) for name, files in own.items()},
        shared=_named(shared, 0, total),
    )


def _groups(
    bound: BoundModel,
    by_task: Mapping[str, list[Piece]],
    common: frozenset[str],
    max_bytes: int | None,
    *,
    keeps: bool,
) -> tuple[list[Group], dict[str, list[Group]]]:
    """Return the shared pieces file by file, and each task's own."""
    first = next(iter(by_task.values()))
    cut = _Cut(bound, first, max_bytes, keeps=keeps)
    shared = cut.files([piece for piece in first if piece.name in common])
    own = {
        name: cut.files([piece for piece in pieces if piece.name not in common])
        for name, pieces in by_task.items()
    }
    return shared, own


def output_dtype(tensor: Tensor, dtype: str | None) -> str:
    """Return the safetensors dtype in which ``--dtype`` writes ``tensor``."""
    return DTYPES[dtype][0] if dtype and tensor.dtype in FLOAT_DTYPES else tensor.dtype


def _pieces(bound: BoundModel, task: Task, dtype: str | None) -> list[Piece]:
    """Return the tensors of one task's model, in the base's order, its own ones last."""
    adapters, index = bound.adapters, task.index
    pieces: list[Piece] = []
    for order, (base_name, tensor) in enumerate(bound.base.tensors.items()):
        name = bound.prefix + base_name
        module, _, kind = name.rpartition(".")
        if module in adapters.heads:
            continue
        out = output_dtype(tensor, dtype)
        replaced = adapters.replacement(name, index)
        rows = adapters.own_rows(name, index)
        if replaced is not None:
            pieces.append(_value(name, out, replaced, order))
        elif rows is not None:
            pieces.append(_patched(name, out, tensor, rows, order))
        elif kind == "weight" and _is_folded(bound, module, index):
            pieces.append(_folded(name, out, tensor, task, order))
        else:
            pieces.append(Piece(name, out, tensor.shape, tensor, order=order))
    order = len(bound.base.tensors)
    touched = bound.base_tensor(f"{next(iter(adapters.layers))}.weight")
    out = output_dtype(touched, dtype)
    # A head that the model class does not have goes to a file of its own: see ``head_file``.
    heads_inside = {} if bound.checkpoint.readouts else adapters.heads
    for module, heads in heads_inside.items():
        order += 2
        pieces.append(_value(f"{module}.weight", out, heads[index].weight, order - 1))
        pieces.append(_value(f"{module}.bias", out, heads[index].bias, order))
    return pieces


def _folded(name: str, dtype: str, tensor: Tensor, task: Task, order: int) -> Piece:
    module = name.removesuffix(".weight")
    return Piece(name, dtype, tensor.shape, tensor, None, task, module, order)


def _value(name: str, dtype: str, values: Array, order: int) -> Piece:
    return Piece(name, dtype, values.shape, None, lambda: values, order=order)


def _patched(name: str, dtype: str, tensor: Tensor, rows: Rows, order: int) -> Piece:
    def values() -> Array:
        return rows.placed_in(tensor.widened())

    return Piece(name, dtype, tensor.shape, None, values, order=order)


def _is_folded(bound: BoundModel, module: str, task_index: int) -> bool:
    layer = bound.adapters.outlines.get(module)
    if layer is None:
        return False
    return layer.gain is not None or layer.factors(task_index) is not None


def _common(by_task: Mapping[str, list[Piece]]) -> frozenset[str]:
    """Return the names of the tensors that are the same for every task."""
    several = [{piece.name: piece for piece in pieces} for pieces in by_task.values()]
    first, *others = several
    return frozenset(
        name
        for name, piece in first.items()
        if piece.task is None
        and piece.source is not None
        and all(name in other and other[name].source is piece.source for other in others)
        and all(other[name].task is None for other in others)
    )


class _Cut:
    """Cuts a list of pieces into files.

    Args:
        bound: Its base's files are kept if nothing asks for others.
        pieces: All pieces of one task, to know the largest base file by.
        max_bytes: Size limit; None for the largest base file's.
        keeps: Keep the base's files.
    """

    def __init__(
        self, bound: BoundModel, pieces: Iterable[Piece], max_bytes: int | None, *, keeps: bool
    ) -> None:
        base = bound.base
        self._file_of = {bound.prefix + name: file for name, file in base.file_of.items()}
        self._last = len(base.weight_files) - 1
        self._keeps = keeps
        # A merged folder has no folders in it: there, files of one name would be one file.
        is_flat = not any("/" in name for name in base.file_names)
        self._names = [
            name if is_flat and name.endswith(".safetensors") else "" for name in base.file_names
        ]
        sizes = [0] * len(base.weight_files)
        for piece in pieces:
            sizes[self._file_of.get(piece.name, self._last)] += piece.size_bytes
        self._max_bytes = max_bytes or (max(sizes) if len(sizes) > 1 else SHARD_BYTES)

    def files(self, pieces: Sequence[Piece]) -> list[Group]:
        """Return the pieces file by file, each with the base file's name if that is kept."""
        if not self._keeps:
            return [("", group) for group in self._by_size(pieces)]
        groups: dict[int, list[Piece]] = {}
        for piece in pieces:
            groups.setdefault(self._file_of.get(piece.name, self._last), []).append(piece)
        return [(self._names[number], group) for number, group in sorted(groups.items())]

    def _by_size(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        groups: list[list[Piece]] = []
        size = 0
        for piece in pieces:
            if not groups or size + piece.size_bytes > self._max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(piece)
            size += piece.size_bytes
        return groups


def _named(groups: list[Group], before: int, total: int) -> tuple[OutputFile, ...]:
    """Return the files, numbered after ``before`` others of ``total`` where unnamed."""
    files = []
    for number, (name, group) in enumerate(groups, before + 1):
        numbered = SINGLE_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        files.append(OutputFile(name or numbered, tuple(group)))
    return tuple(files)


def _are_aligned(files: list[list[Group]]) -> bool:
    """Return whether every tensor begins on a multiple of its item size."""
    for groups in files:
        for _, pieces in groups:
            offset = 0
            for piece in pieces:
                if offset % piece.itemsize:
                    return False
                offset += piece.size_bytes
    return True


def _largest_items_first(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces ordered as the safetensors library does, so that all are aligned."""
    span = max(piece.order for piece in pieces) + 1
    ordered = sorted(pieces, key=lambda piece: (-piece.itemsize, piece.order))
    return [replace(piece, order=piece.order - piece.itemsize * span) for piece in ordered]


def parse_size(text: str) -> int:
    """Return bytes for ``500MB``, ``5GB``, ``1GiB`` or a plain number.

    Raises:
        UsageError: It is none of these, or not positive.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20,
             "GIB": 2**30}  # fmt: skip
    stripped = text.strip().upper()
    number = stripped.rstrip("KMGIB").strip()
    unit = stripped[len(stripped.rstrip("KMGIB")) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(
            f"size {text!r}: not a size",
            expected="a positive number with a unit, such as 500MB or 5GB",
            fix="Correct --max-shard-size",
        )
    return size
