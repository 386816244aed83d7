"""What the pickle of a ``torch.save`` file names -> tensors whose values stay in the file.

``torch`` pickles a tensor as a call: ``_rebuild_tensor_v2(storage, offset, size, stride, ...)``;
a storage is a persistent id that says where its bytes lie. ``KNOWN`` has our stand-in for each
such name, so that nothing of torch is imported. Every number is checked here against the
storage's true size: a view may not reach outside it.

Source: torch/_utils.py, torch/_tensor.py (``Tensor.__reduce_ex__``) and torch/serialization.py
in https://github.com/pytorch/pytorch/tree/v2.13.0.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.files.restricted_pickle import BrokenPickleError, is_key
from mtl_export.checkpoint.files.zip_file import ZipMember, damaged
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor

MAX_RANK = 64  # numpy's
# Views may repeat elements (stride 0); a small file must not fill the memory by that.
MAX_REPEATED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StorageType:
    """A kind of storage, or a dtype.

    Attributes:
        dtype: safetensors' word for what it holds; bytes if untyped.
    """

    dtype: str


class MappedBytes:
    """Bytes that lie in a file as they are.

    Args:
        path: The file.
        offset_bytes: Where they begin.
        size_bytes: How many there are.
    """

    def __init__(self, path: Path, offset_bytes: int, size_bytes: int) -> None:
        self._path, self._offset_bytes, self.size_bytes = path, offset_bytes, size_bytes

    def at(self, begin: int, count: int) -> Array:
        """Return ``count`` bytes from ``begin`` on: uint8, private to the caller."""
        start = self._offset_bytes + begin
        skipped = start % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            try:
                mapped = mmap.mmap(
                    file.fileno(), skipped + count, access=mmap.ACCESS_COPY, offset=start - skipped
                )
            except ValueError as error:
                raise damaged(self._path, str(error)) from error
        return np.frombuffer(mapped, np.uint8, count, skipped)


class InflatedBytes:
    """Bytes that are compressed in a zip file; inflated once, when first asked for.

    Args:
        member: Where they lie.
    """

    def __init__(self, member: ZipMember) -> None:
        self._member, self.size_bytes = member, member.size_bytes

    @cached_property
    def _content(self) -> bytes:
        return self._member.read(self.size_bytes)

    def at(self, begin: int, count: int) -> Array:
        """Return ``count`` bytes from ``begin`` on: uint8, private to the caller."""
        return np.frombuffer(self._content, np.uint8, count, begin).copy()


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements in a row.

    Attributes:
        dtype: safetensors' word for what they are.
        count: How many.
        content: Returns where their bytes lie.
        begin: Which of the bytes' elements is the first one.
    """

    dtype: str
    count: int
    content: Callable[[], MappedBytes | InflatedBytes]
    begin: int = 0


def _rebuild_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Return the tensor for (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    if not 4 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
        raise BrokenPickleError("a tensor is not built from a storage")
    storage, offset, size, stride, *rest = arguments
    if any(rest[2:]):
        raise BrokenPickleError("a tensor with the conjugate or negative bit")
    shape, strides = _counts(size), _counts(stride)
    (offset,) = _counts((offset,))
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise BrokenPickleError(f"a tensor of rank {len(shape)} with {len(strides)} strides")
    span = 0
    if 0 not in shape:
        span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if offset + span > storage.count:
            raise BrokenPickleError("a tensor reaches beyond its storage")
    itemsize = NUMPY_DTYPES[storage.dtype].itemsize
    if prod(shape) > max(storage.count, MAX_REPEATED_BYTES // itemsize):
        raise BrokenPickleError("a tensor repeats its elements too often")
    part = replace(storage, begin=storage.begin + offset, count=span)
    return Tensor("", storage.dtype, shape, lambda: _viewed(part, shape, strides))


def _viewed(storage: Storage, shape: Sequence[int], strides: Sequence[int]) -> Array:
    """Return the values: mapped if they lie in a row, else copied."""
    dtype = NUMPY_DTYPES[storage.dtype]
    if not storage.count:
        return np.empty(shape, dtype)
    begin = storage.begin * dtype.itemsize
    row = storage.content().at(begin, storage.count * dtype.itemsize)
    steps = [step * dtype.itemsize for step in strides]
    values: Array = np.ndarray(shape, dtype, row, strides=steps)  # it checks the bounds again
    return np.require(values, requirements=["C", "A"])


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    """Return the tensor for (untyped storage, offset, size, stride, grad, hooks, dtype, ...)."""
    if len(arguments) < 7 or not isinstance(arguments[0], Storage):
        raise BrokenPickleError("a tensor is not built from a storage")
    storage, dtype = arguments[0], arguments[6]
    if storage.dtype != "U8" or not isinstance(dtype, StorageType):
        raise BrokenPickleError("a tensor without a dtype")
    itemsize = NUMPY_DTYPES[dtype.dtype].itemsize
    typed = replace(storage, dtype=dtype.dtype, count=storage.count // itemsize)
    return _rebuild_tensor((typed, *arguments[1:6], *arguments[7:8]))


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Tensor:
    """Return the tensor that a parameter is, without its Python attributes."""
    if not 2 <= len(arguments) <= 4 or not isinstance(arguments[0], Tensor):
        raise BrokenPickleError("a parameter is not built from a tensor")
    return arguments[0]


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Return a dictionary, of the pairs that Python 2's OrderedDict is built from."""
    pairs = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(pairs, list):
        raise BrokenPickleError("a dictionary is not built from pairs")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not is_key(pair[0]):
            raise BrokenPickleError("a dictionary is not built from pairs")
    return dict(pairs)


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    """Return a set of numbers and texts."""
    items = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(items, list) or not all(map(is_key, items)):
        raise BrokenPickleError("a set is not built from numbers and texts")
    return set(items)


def _counts(numbers: object) -> tuple[int, ...]:
    """Return ``numbers`` if they are sizes that a file can have."""
    if not isinstance(numbers, tuple | list):
        raise BrokenPickleError("a size that is no tuple")
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise BrokenPickleError("a size that is no count")
    return tuple(numbers)


_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64",
    "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
KNOWN: dict[str, object] = {
    "collections OrderedDict": _dictionary,
    # scale-lab/MTLoRA stores its configuration; yacs is not needed to read a dictionary.
    "yacs.config CfgNode": _dictionary,
    "builtins set": _set,
    "__builtin__ set": _set,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "torch float8_e4m3fn": StorageType("F8_E4M3"),
    "torch float8_e5m2": StorageType("F8_E5M2"),
    "torch.storage UntypedStorage": StorageType("U8"),
    **{f"torch {name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
}


def storage_id(value: object, length: int) -> tuple[StorageType, str, int]:
    """Return kind, key and element count from ("storage", kind, key, location, count, ...).

    Args:
        value: The persistent id.
        length: How many items it has.

    Raises:
        BrokenPickleError: It is something else.
    """
    if not isinstance(value, tuple) or len(value) != length or value[0] != "storage":
        raise BrokenPickleError("a persistent id that is no storage")
    _, kind, key, _, count, *_ = value
    if not isinstance(kind, StorageType) or not isinstance(key, str):
        raise BrokenPickleError("a storage without kind or key")
    (checked,) = _counts((count,))
    return kind, key, checked
