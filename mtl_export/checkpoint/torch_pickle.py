"""PyTorch pickles: never unpickled freely; a file that asks to run code is refused by name.

A ``torch.save`` file is a zip whose ``data.pkl`` is a pickle. Pickle opcodes can
import and call anything. ``ALLOWED_GLOBALS`` lists what a plain state dict needs;
the opcodes are only disassembled here (``pickletools``), never executed.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import CheckpointError, IntegrityError, shortened

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
UNKNOWN = "? ?"
ALLOWED_GLOBALS = frozenset({
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in (
        "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
    )),
})  # fmt: skip


def refuse_code(path: Path) -> None:
    """Refuse ``path``, or a file in the folder ``path``, if it is a pickle with code in it.

    Raises:
        IntegrityError: A pickle imports something a state dict does not need.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix in SUFFIXES and file.is_file():
            refuse_foreign(file)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``torch.save`` file by key; their values stay on disk.

    The file holds one flat dictionary of tensors: a state dict. Tensors that shared
    storage when saved come back as several records of equal values.

    Raises:
        IntegrityError: It is a pickle that asks to run code.
        CheckpointError: It is truncated, no ``torch.save`` file, or holds something other
            than named dense tensors of a known dtype.
    """
    import torch

    refuse_foreign(path)
    try:
        # Only the zip container, torch's since 1.6, can be mapped instead of read.
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        # torch raises RuntimeError, EOFError, pickle and zip errors; all mean a broken file.
        # Its first sentence only: the next one advises to load the file unsafely.
        reason = str(error).strip().split(". ")[0].splitlines() or [type(error).__name__]
        raise CheckpointError(
            where=str(path),
            found=f"torch.load cannot read it ({reason[0]})",
            expected="a whole file written by torch.save",
            fix="Copy or save the file again; compare its size with the original",
        ) from error
    entries = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    bad = [f"{key!r} is a {_kind(value)}" for key, value in entries if not _is_plain(key, value)]
    if bad or not isinstance(loaded, dict):
        raise CheckpointError(
            where=str(path),
            found=shortened(bad),
            expected="one dictionary of names to dense tensors",
            fix="Save model.state_dict(), or the dictionary that the trainer documents",
        )
    return {key: tensor_record(key, value) for key, value in loaded.items()}


# torch's word for a dtype -> safetensors'
_TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def _is_plain(key: object, value: object) -> bool:
    import torch

    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and str(value.dtype).removeprefix("torch.") in _TORCH_DTYPES
    )


def _kind(value: object) -> str:
    import torch

    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def tensor_record(name: str, value: torch.Tensor) -> Tensor:
    """Return a loaded tensor as a record, bfloat16 included."""
    import torch

    dtype = _TORCH_DTYPES[str(value.dtype).removeprefix("torch.")]

    def load() -> Array:
        dense = value.detach().contiguous()
        if dtype == "BF16":  # numpy has no bfloat16 of its own: reinterpret the bits
            bits: Array = dense.view(torch.int16).numpy()
            return bits.view(NUMPY_DTYPES[dtype])
        array: Array = dense.numpy()
        return array

    return Tensor(name, dtype, tuple(value.shape), load)


def refuse_foreign(file: Path, also: frozenset[str] = frozenset()) -> None:
    """Refuse a pickle that imports more than a state dict needs, and more than ``also``.

    Raises:
        IntegrityError: It does; the message names what it imports.
    """
    foreign = sorted(imported_globals(file) - ALLOWED_GLOBALS - also)
    if foreign:
        raise IntegrityError(
            where=str(file),
            found=f"a pickle that imports {shortened(foreign)}",
            expected="only what a dictionary of tensors needs",
            why="loading a pickle runs whatever it imports",
            fix="Do not load it; ask its author for safetensors",
        )


def imported_globals(file: Path) -> frozenset[str]:
    """Return ``"module name"`` for everything the pickle would import.

    A file that is no readable pickle imports nothing; an opcode whose target
    cannot be told from the text is reported as ``"? ?"``.
    """
    names: set[str] = set()
    for data in _pickles(file):
        for pickle in _consecutive(data):
            names.update(_globals_of(pickle))
    return frozenset(names)


def pickled_strings(file: Path) -> frozenset[str]:
    """Return every text in the pickle, a state dict's keys among them; nothing is executed."""
    return frozenset(
        argument
        for data in _pickles(file)
        for pickle in _consecutive(data)
        for opcode, argument in pickle
        if isinstance(argument, str) and "UNICODE" in opcode.name
    )


Opcode = tuple[pickletools.OpcodeInfo, Any]


def _globals_of(opcodes: Iterator[Opcode]) -> Iterator[str]:
    """Yield what one pickle imports, following strings through its memo."""
    # The last values pushed; None is anything but a known string.
    pushed: list[str | None] = [None, None]
    memo: dict[int, str | None] = {}
    for opcode, argument in opcodes:
        if opcode.name in {"GLOBAL", "INST"}:
            yield str(argument)
        elif opcode.name in {"EXT1", "EXT2", "EXT4"}:
            yield UNKNOWN
        elif opcode.name == "STACK_GLOBAL":
            module, name = pushed[-2:]
            yield UNKNOWN if module is None or name is None else f"{module} {name}"
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            memo[int(argument)] = pushed[-1]
        elif opcode.name in {"GET", "BINGET", "LONG_BINGET"}:
            pushed.append(memo.get(int(argument)))
        elif opcode.name not in {"PROTO", "FRAME"}:
            pushed.append(argument if isinstance(argument, str) else None)


def _consecutive(data: bytes) -> Iterator[Iterator[Opcode]]:
    """Yield each pickle in ``data``: before 1.6, torch.save wrote five in a row.

    What follows them are the tensors' bytes, which must not be read as opcodes. Source:
    ``_legacy_load`` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py.
    """
    stream = io.BytesIO(data)

    def one() -> Iterator[Opcode]:
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                yield opcode, argument
        except Exception:  # pickletools raises whatever the broken argument raises
            stream.seek(0, io.SEEK_END)

    for _ in range(5):
        if stream.tell() < len(data):
            yield one()


def _pickles(file: Path) -> list[bytes]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return [file.read_bytes()]
