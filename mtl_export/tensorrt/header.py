"""An engine file's first bytes -> what can be known about it without a GPU.

TensorRT-RTX engines open with 64 bytes, integers little-endian:

    offset  size  meaning
    0       4     ``vtrt``
    8       8     number of parts
    16      8     size of the whole file
    24      4     version of the library, one byte per number
    32      4     GPUs it may run on, one bit each (``CAPABILITIES``)
    64      24·n  parts: tag (4, reversed), 4 zeros, offset (8), size (8)

The part ``ENGN`` holds the graph and its kernels, ``WGHT`` the weights. Engines of one
structure share the first, but not always byte for byte: the builder numbers some internal
values (``__mye48221``) and lists some of them in the order of their addresses, which
change from build to build. 44 builds of one graph gave 17 files, of one size, with one
sequence of weights, and with the same words in ``ENGN`` once the numbers are left out. A
graph of several outputs also has them in any order, as names between numbers. So a graph
is known by the words of its kernels' text, nine tenths of the part, and by the names
between them, each sorted.

NVIDIA documents none of this; it was read off engines of 1.7.1.116, so a file that
differs gives None, not an error. Engines of ``tensorrt`` open differently and give None.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"vtrt"
HEADER_BYTES = 64
GRAPH_PART = "ENGN"
_INTERNAL_NUMBER = re.compile(rb"(__mye)\d+")
# Kernels are long text; what is shorter may be names that adjacent numbers seem to extend.
_TEXT = re.compile(rb"[\t\n\r -~]{200,}")
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_.]{3,}")
_PART = struct.Struct("<4s4xQQ")
_MAX_PARTS = 64

# Bit in the header -> compute capability. The last one stands for GPUs not yet known.
CAPABILITIES = {
    1: "7.5",
    2: "8.0",
    4: "8.6",
    8: "8.9",
    16: "12.0",
    32: "12.1",
    64: ">12.1",
}
# TensorRT-RTX's targets by default: all but the oldest.
DEFAULT_TARGETS = tuple(CAPABILITIES.values())[1:]


@dataclass(frozen=True)
class EngineHeader:
    """The readable part of a TensorRT-RTX engine.

    Attributes:
        size_bytes: Size of the file, as the file itself says.
        version: Library that wrote it, such as ``1.7.1.116``.
        capabilities: Compute capabilities it was built for, ascending.
        parts: Tag -> (offset, size), both in bytes.
    """

    size_bytes: int
    version: str
    capabilities: tuple[str, ...]
    parts: dict[str, tuple[int, int]]


def read_header(path: Path) -> EngineHeader | None:
    """Return the header of the engine at ``path``, or None if it is of no known layout."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or head[:4] != MAGIC:
            return None
        count, size = struct.unpack_from("<QQ", head, 8)
        if count > _MAX_PARTS:
            return None
        table = file.read(_PART.size * count)
    if len(table) < _PART.size * count:
        return None
    mask = struct.unpack_from("<I", head, 32)[0]
    return EngineHeader(
        size_bytes=size,
        version=".".join(str(number) for number in head[24:28]),
        capabilities=tuple(name for bit, name in CAPABILITIES.items() if mask & bit),
        parts={
            tag[::-1].decode("ascii", "replace"): (offset, length)
            for tag, offset, length in _PART.iter_unpack(table)
        },
    )


def sha256_of_graph(path: Path, header: EngineHeader | None) -> str:
    """Return the SHA-256 of the graph part's words and names, or "" if it cannot be told apart.

    It is the same for engines that differ only in weights, and for builds of one graph.
    """
    if header is None or GRAPH_PART not in header.parts:
        return ""
    offset, size = header.parts[GRAPH_PART]
    if offset + size > path.stat().st_size:
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        part = file.read(size)
    digest = hashlib.sha256()
    part = _INTERNAL_NUMBER.sub(rb"\1", part)
    words = (word for text in _TEXT.findall(part) for word in text.split())
    for found in (words, _NAME.findall(part)):
        digest.update(b"\n".join(sorted(found)) + b"\n\n")
    return digest.hexdigest()
