"""Weights of graphs -> external data files, every tensor stored once, one in memory at a time.

    model.onnx.data       what is this folder's own, for all graphs in it
    shared.onnx.data      what the tasks of a checkpoint have in common; the same bytes in
                          every task's folder

ONNX wants a file for every folder: locations that lead out of it are refused by onnx and by
ONNX Runtime, links by onnx and onnx-ir ("hardlink attack"). ``shared.onnx.data`` is therefore
cloned: by reference where the file system can (XFS, Btrfs: no bytes are written), else copied
by the kernel. As a hard link it is one file for all folders, on disk and in memory, but only
ONNX Runtime opens it.

A tensor of at least a page begins at a page (4096 bytes), so that it can be mapped; a smaller
one at a cache line. Gaps are zeros. Offsets and lengths are 64 bits wide: nothing here ends
at 2 GB.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.names import DATA_FILE, MODEL_FILE

SHARED_FILE = "shared.onnx.data"
# Smaller tensors stay in the graph: shapes and axes, which tools read without external data.
INLINE_BYTES = 256
PAGE_BYTES, LINE_BYTES = 4096, 64
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        file: Name of the data file.
        offset: First byte.
        length: Count of bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that was hashed while it was written.

    Attributes:
        sha256: 64 hex digits.
        size_bytes: Its size.
    """

    sha256: str
    size_bytes: int


class DataFile:
    """One data file, written front to back.

    Args:
        path: The file to create.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._digest = hashlib.sha256()
        self._end = 0
        # By length and first bytes: tensors that may be equal are compared byte by byte.
        self._seen: dict[tuple[int, bytes], list[int]] = {}

    def __enter__(self) -> DataFile:
        """Return the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    @property
    def written(self) -> WrittenFile:
        """Return hash and size of what is written so far."""
        return WrittenFile(self._digest.hexdigest(), self._end)

    def add(self, tensor: ir.TensorProtocol) -> TensorPlace:
        """Return where ``tensor`` lies, after writing it if no equal one is there."""
        content = _bytes_of(tensor)
        key = (len(content), bytes(content[:LINE_BYTES]))
        places = self._seen.setdefault(key, [])
        for offset in places:
            if self._holds(offset, content):
                return TensorPlace(self._path.name, offset, len(content))
        alignment = PAGE_BYTES if len(content) >= PAGE_BYTES else LINE_BYTES
        self._write(memoryview(bytes(-self._end % alignment)))
        places.append(self._end)
        place = TensorPlace(self._path.name, self._end, len(content))
        self._write(content)
        return place

    def _write(self, content: memoryview) -> None:
        for begin in range(0, len(content), BLOCK_BYTES):
            block = content[begin : begin + BLOCK_BYTES]
            self._digest.update(block)
            self._file.write(block)
        self._end += len(content)

    def _holds(self, offset: int, content: memoryview) -> bool:
        self._file.seek(offset)
        blocks = (content[begin : begin + BLOCK_BYTES]
                  for begin in range(0, len(content), BLOCK_BYTES))  # fmt: skip
        is_equal = all(self._file.read(len(block)) == block for block in blocks)
        self._file.seek(self._end)
        return is_equal


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """Return the tensor as a data file holds it: little-endian, packed where ONNX packs."""
    values: Array = tensor.numpy()
    if values.nbytes != tensor.nbytes or not np.little_endian:
        return memoryview(tensor.tobytes())
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class SharedData:
    """``shared.onnx.data`` of one export: written into the first folder, then cloned.

    Args:
        is_linked: Make hard links instead.
    """

    def __init__(self, *, is_linked: bool = False) -> None:
        self._is_linked = is_linked
        self._path: Path | None = None
        self._written: WrittenFile | None = None
        self._places: dict[tuple[str, str], TensorPlace] = {}
        self._tensors: dict[tuple[str, str], ir.TensorProtocol] = {}

    def give(
        self, folder: Path, tensors: Mapping[tuple[str, str], ir.TensorProtocol]
    ) -> tuple[dict[tuple[str, str], TensorPlace], WrittenFile]:
        """Put the file into ``folder``.

        Args:
            folder: An output folder that does not have it.
            tensors: What should be in it, by graph and name.

        Returns:
            Where those of ``tensors`` lie that are in it, which are all but for the first
            folder's choice; and the file.
        """
        if self._path is None or self._written is None:
            with DataFile(folder / SHARED_FILE) as file:
                self._places = {key: file.add(tensor) for key, tensor in tensors.items()}
                self._tensors, self._written = dict(tensors), file.written
        else:
            self._clone(self._path, folder / SHARED_FILE)
        places = {key: self._places[key] for key in tensors if self._has(key, tensors[key])}
        return places, self._written

    def settle(self, folder: Path) -> None:
        """Say where the first folder has been put, from which the others are served."""
        if self._written is not None and self._path is None:
            self._path = folder / SHARED_FILE

    def _clone(self, source: Path, target: Path) -> None:
        if self._is_linked:
            with suppress(OSError):  # another disk, or a file system without links
                os.link(source, target)
                return
        clone_file(source, target)

    def _has(self, key: tuple[str, str], tensor: ir.TensorProtocol) -> bool:
        known = self._tensors.get(key)
        # A trace's tensor is the very same object in every graph; a computed one is not.
        return known is tensor or (
            isinstance(known, ir.LazyTensor)
            and isinstance(tensor, ir.LazyTensor)
            and (known.dtype, known.shape) == (tensor.dtype, tensor.shape)
        )


def write_data(
    models: Mapping[str, ir.Model],
    folder: Path,
    shared: SharedData | None = None,
    is_common: Callable[[str, ir.TensorProtocol], bool] = lambda name, tensor: False,
) -> tuple[dict[tuple[str, str], TensorPlace], dict[str, WrittenFile]]:
    """Write the weights of all graphs of one folder.

    Args:
        models: By stem.
        folder: Where to.
        shared: What the folders of an export have in common; None if there is one folder.
        is_common: Whether a tensor, given with its name, is the same in all folders.

    Returns:
        Where each initializer lies, by stem and name; the files by name.
    """
    tensors = {(stem, value.name or ""): tensor for stem, value, tensor in initializers(models)}
    places: dict[tuple[str, str], TensorPlace] = {}
    files: dict[str, WrittenFile] = {}
    if shared is not None:
        common = {key: tensor for key, tensor in tensors.items() if is_common(key[1], tensor)}
        places, files[SHARED_FILE] = shared.give(folder, common)
    with DataFile(folder / DATA_FILE) as file:
        places |= {key: file.add(tensors[key]) for key in tensors if key not in places}
        files[DATA_FILE] = file.written
    return places, files


def save_graph(model: ir.Model, folder: Path) -> dict[str, WrittenFile]:
    """Write the only graph of a folder, ``model.onnx``; return its data's hash and size by name."""
    models = {Path(MODEL_FILE).stem: model}
    places, files = write_data(models, folder)
    with externalised(models, places):
        ir.save(model, folder / MODEL_FILE)
    return files


def clone_file(source: Path, target: Path) -> None:
    """Copy a file: by reference where the file system can, else in the kernel."""
    copy_file_range = getattr(os, "copy_file_range", None)  # Linux
    if copy_file_range is not None:
        try:
            with source.open("rb") as read, target.open("wb") as write:
                left = os.fstat(read.fileno()).st_size
                while left and (count := copy_file_range(read.fileno(), write.fileno(), left)):
                    left -= count
            if not left:
                return
        except OSError:
            pass  # not between these file systems; if the disk is full, the next line says so
    shutil.copyfile(source, target)


@contextmanager
def externalised(
    models: Mapping[str, ir.Model], places: Mapping[tuple[str, str], TensorPlace]
) -> Iterator[None]:
    """Point the initializers of ``models`` at ``places`` for the block."""
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for stem, value, tensor in initializers(models):
            place = places.get((stem, value.name or ""))
            if place is None:
                continue
            changed.append((value, tensor))
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
        yield
    finally:
        for value, tensor in changed:
            value.const_value = tensor


def initializers(
    models: Mapping[str, ir.Model],
) -> Iterator[tuple[str, ir.Value, ir.TensorProtocol]]:
    """Yield stem, value and tensor of all that is worth a place in a data file."""
    for stem, model in models.items():
        for graph in model.graphs():
            for value in list(graph.initializers.values()):
                tensor = value.const_value
                is_text = tensor is not None and tensor.dtype == ir.DataType.STRING
                if tensor is not None and not is_text and tensor.nbytes > INLINE_BYTES:
                    yield stem, value, tensor
