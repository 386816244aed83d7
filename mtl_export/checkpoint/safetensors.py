"""``.safetensors`` files: names, dtypes, shapes and offsets, without the values.

Layout, from https://github.com/huggingface/safetensors/blob/24b0b28/README.md:
8 bytes little-endian header size N, N bytes of JSON
``{name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}}`` with an optional
``"__metadata__": {str: str}``, then the data; offsets count from the end of the header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError


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
            that no base model or adapter uses.
        OSError: The system refuses to open it.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_file():
        path.open("rb").close()  # of one that it may not read the library says there is none
    try:
        # The library checks sizes, overlaps and the header; what follows only reads offsets.
        with safe_open(str(path), framework="numpy") as handle:
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            where=str(path),
            found=f"not a whole safetensors file ({error})",
            expected="a header followed by all the bytes it announces",
            fix="Copy or save the file again; compare its size with the original",
        ) from error
    with path.open("rb") as file:
        header_size_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size_bytes))
    header.pop("__metadata__", None)
    start = 8 + header_size_bytes
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, int] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in NUMPY_DTYPES:
            raise CheckpointError(
                where=f"{path}: {name!r}",
                found=f"dtype {entry['dtype']}",
                expected=f"one of {', '.join(NUMPY_DTYPES)}",
                fix="Save the tensor in one of these dtypes",
            )
        offsets[name] = start + entry["data_offsets"][0]
        tensors[name] = _tensor(path, name, entry["dtype"], tuple(entry["shape"]), offsets[name])
    return SafetensorsFile(
        path, MappingProxyType(tensors), MappingProxyType(offsets), MappingProxyType(metadata)
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
