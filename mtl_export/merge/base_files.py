"""The base's weight files, read in pieces by several threads and hashed on the way."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.merge.hashed_files import HashedFile, read_at


class BaseFiles:
    """The base's files, open, each with a hash of it if asked to.

    Args:
        bound: Whose base it is.
        hashed: Whether to hash.
    """

    def __init__(self, bound: BoundModel, *, hashed: bool) -> None:
        base = bound.base
        self._names = dict(zip(base.weight_files, base.file_names, strict=True))
        self._paths = [file for file in base.weight_files if file.suffix == ".safetensors"]
        # Other formats are not read from front to back, nor is a base of which a part is left out.
        self.hashed = hashed and len(self._paths) == len(base.weight_files) and _is_all_read(bound)
        self.hashes: dict[Path, HashedFile] = {}
        self._descriptors: dict[Path, int] = {}

    def open(self, stack: ExitStack) -> None:
        """Open the files until ``stack`` ends, and hash their headers."""
        for path in self._paths:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            stack.callback(os.close, descriptor)
            self._descriptors[path] = descriptor
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            if self.hashed:
                self.hashes[path] = HashedFile()
                size = bytearray(8)
                read_at(descriptor, memoryview(size), 0)
                header = bytearray(8 + int.from_bytes(size, "little"))
                read_at(descriptor, memoryview(header), 0)
                self.hashes[path].hash_at(0, memoryview(header))

    def read(self, tensor: Tensor, begin: int, end: int, out: Array) -> None:
        """Fill ``out`` with elements ``begin`` to ``end`` of ``tensor``."""
        if tensor.file is None:
            np.copyto(out, tensor.numpy().reshape(-1)[begin:end])
            return
        offset = tensor.offset_bytes + begin * out.itemsize
        read_at(self._descriptors[tensor.file], out.view(np.uint8).data, offset)

    def hash(self, tensor: Tensor, begin: int, values: Array) -> None:
        """Hash elements of ``tensor`` from ``begin`` on, in their turn."""
        if tensor.file is not None:
            offset = tensor.offset_bytes + begin * values.itemsize
            self.hashes[tensor.file].hash_at(offset, values.view(np.uint8).data)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by ``file_names``; empty if they were not hashed."""
        return {self._names[path]: hashed.progress().sha256 for path, hashed in self.hashes.items()}


def _is_all_read(bound: BoundModel) -> bool:
    """Return whether the base's tensors are all that its files hold after their headers."""
    base = bound.base
    ends: dict[Path, int] = {}
    for tensor in base.tensors.values():
        if tensor.file is None:
            return False
        if tensor.file not in ends:
            ends[tensor.file] = _header_bytes(tensor.file)
        if tensor.offset_bytes != ends[tensor.file]:
            return False
        ends[tensor.file] += tensor.size_bytes
    return all(ends.get(file) == file.stat().st_size for file in base.weight_files)


def _header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
