"""PyTorch pickles: never unpickled freely; a file that asks to run code is refused by name.

A ``torch.save`` file is a zip whose ``data.pkl`` is a pickle. Pickle opcodes can
import and call anything. ``ALLOWED_GLOBALS`` lists what a plain state dict needs;
the opcodes are only disassembled here (``pickletools``), never executed.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from mtl_export.errors import IntegrityError, shortened

SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})
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
            foreign = sorted(imported_globals(file) - ALLOWED_GLOBALS)
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
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in {"GLOBAL", "INST"}:
                    names.add(str(argument))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(" ".join(strings[-2:]) if len(strings) > 1 else "? ?")
                elif opcode.name in {"EXT1", "EXT2", "EXT4"}:
                    names.add("? ?")
                elif isinstance(argument, str):
                    strings.append(argument)
        except Exception:
            continue
    return frozenset(names)


def _pickles(file: Path) -> list[bytes]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return [file.read_bytes()]
