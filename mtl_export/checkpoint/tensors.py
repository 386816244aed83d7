"""A tensor that is known by name, dtype and shape, and read only when asked for.

dtype names are those of the safetensors format; ``NUMPY_DTYPES`` is its table at
https://github.com/huggingface/safetensors/blob/24b0b28/safetensors/src/tensor.rs,
restricted to what a base model or an adapter can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor.

    Attributes:
        name: Its key in the file.
        dtype: A key of ``NUMPY_DTYPES``.
        shape: Its shape; ``()`` for a scalar.
        load: Reads it: an array of exactly that dtype and shape, row-major.
        file: The file whose bytes are the row-major values, little-endian; None where
            only ``load`` can give them.
        offset_bytes: Where in ``file`` they begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Array]
    file: Path | None = None
    offset_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Return the stored size in bytes."""
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize

    def numpy(self) -> Array:
        """Return the values in the stored dtype."""
        return self.load()

    def widened(self) -> Array:
        """Return the values as float64 if stored so, else float32, without loss."""
        values = self.load()
        return values if values.dtype == np.float64 else values.astype(np.float32)
