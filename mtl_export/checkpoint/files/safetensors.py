"""``.safetensors`` files: names, dtypes, shapes and offsets, without the values.

Layout, from https://github.com/huggingface/safetensors/blob/24b0b28/README.md:
8 bytes little-endian header size N, N bytes of JSON
``{name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}}`` with an optional
``"__metadata__": {str: str}``, then the data; offsets count from the end of the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.checkpoint.files.small_file import DAMAGED, MOST_BYTES, regular_size, system_errors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError, MtlExportError

MOST_AXES = 32
# An empty tensor may announce any other size, which numpy multiplies all the same.
MOST_VALUES = 2**48


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """An opened file.

    Attributes:
        path: The file.
        tensors: Its tensors by name, in file order.
        offsets_bytes: Where each tensor begins, from the start of the file.
        metadata: The string-to-string block, empty when absent.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    offsets_bytes: Mapping[str, int]
    metadata: Mapping[str, str]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Return the index of ``path``; no tensor is read.

    Raises:
        CheckpointError: The file is truncated, not safetensors, or holds a dtype
            that no base model or adapter uses, or a shape that numpy cannot hold.
        UsageError: The system refuses to open it.
    """
    from safetensors import SafetensorError, safe_open

    header_size_bytes = _header_size(path)
    try:
        # The library checks sizes, overlaps and the header; what follows only reads offsets.
        with safe_open(str(path), framework="numpy") as handle:
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error})",
            expected="a header followed by all the bytes it announces",
            fix="Copy or save the file again; compare its size with the original",
        ) from error
    with path.open("rb") as file:
        file.seek(8)
        header = parse_json(file.read(header_size_bytes), str(path))
    header.pop("__metadata__", None)
    start = 8 + header_size_bytes
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, int] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        _check(f"{path}: {name!r}", entry["dtype"], entry["shape"])
        offsets[name] = start + entry["data_offsets"][0]
        tensors[name] = _tensor(path, name, entry["dtype"], tuple(entry["shape"]), offsets[name])
    return SafetensorsFile(
        path, MappingProxyType(tensors), MappingProxyType(offsets), MappingProxyType(metadata)
    )


def _header_size(path: Path) -> int:
    """Return how long the header is, once it is known to be no bomb and the file no pipe."""

    def refused(found: str) -> MtlExportError:
        expected = f"a safetensors file, its header at most {MOST_BYTES:,} bytes"
        return CheckpointError(f"{path}: {found}", expected=expected, fix=DAMAGED)

    with system_errors(path, refused):
        regular_size(path, refused)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    if size > MOST_BYTES:
        raise refused(f"not a whole safetensors file (its header has {size:,} bytes)")
    return size


def _check(where: str, dtype: str, shape: list[int]) -> None:
    """Refuse a tensor that numpy cannot hold; its bytes are all there, for the library checked."""
    if dtype not in NUMPY_DTYPES:
        raise CheckpointError(
            f"{where}: dtype {dtype}",
            expected=f"one of {', '.join(NUMPY_DTYPES)}",
            fix="Save the tensor in one of these dtypes",
        )
    if len(shape) > MOST_AXES or prod(size or 1 for size in shape) >= MOST_VALUES:
        found = f"{len(shape)} axes, {shape}"
        raise CheckpointError(
            f"{where}: {found[:100]}",
            expected=f"at most {MOST_AXES} axes and {MOST_VALUES:,} values",
            fix=DAMAGED,
        )


def _tensor(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
    def load() -> Array:
        count = int(np.prod(shape, dtype=np.int64))
        with path.open("rb") as file:
            file.seek(offset)
            values = np.fromfile(file, dtype=NUMPY_DTYPES[dtype], count=count)
        return values.reshape(shape)

    return Tensor(name, dtype, shape, load, path, offset)


def write_safetensors(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``arrays`` to ``path``, readable by whom the umask lets.

    The library's own ``save_file`` makes files that only their owner can read.
    """
    from safetensors.numpy import save

    path.write_bytes(save(dict(arrays), None if metadata is None else dict(metadata)))
