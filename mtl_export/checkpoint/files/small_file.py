"""A settings file -> its text, within limits: size before it is read, nesting after.

The doors for JSON, TOML and YAML all pass through here, so that a file of any content, a
folder, a pipe or a file that may not be read ends in one of our errors.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl_export.errors import MtlExportError, UsageError

# Tokenizers are the largest that are read whole: 34 MB (Gemma 3). A parsed value takes up to
# 24 times its text, so this bounds a reader to about 1.5 GB.
MOST_BYTES = 64 * 2**20
# Configurations nest about 10 deep; at some hundreds Python's own repr, copy and json stop.
MOST_DEPTH = 100
# Lists and objects. The merges of Gemma 3's tokenizer are 514,906 lists.
MOST_CONTAINERS = 2_000_000
DAMAGED = "Copy or save the file again"
HUGE = "a whole number of thousands of digits"

# Turns what was found into the error to raise.
Refusal = Callable[[str], MtlExportError]


def text_of(path: Path, refused: Refusal, most_bytes: int = MOST_BYTES) -> str:
    """Return the text of ``path``.

    Args:
        path: The file.
        refused: Gives the error for a file that is broken, or none.
        most_bytes: More are refused before they are read.

    Raises:
        UsageError: The system does not let this user read it.
        MtlExportError: What ``refused`` gives.
    """
    with system_errors(path, refused):
        size_bytes = regular_size(path, refused)
        if size_bytes > most_bytes:
            raise refused(f"{size_bytes:,} bytes, more than {most_bytes:,}")
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise refused(f"more than {most_bytes:,} bytes")
    return decoded(data, refused)


@contextmanager
def system_errors(path: Path, refused: Refusal) -> Iterator[None]:
    """Turn what the system says of ``path`` into our errors.

    Raises:
        UsageError: It does not let this user read it.
        MtlExportError: What ``refused`` gives: there is no such file.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise refused("no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(
            f"{shown_path(path)}: the system refused it ("
            f"{getattr(error, 'strerror', None) or error})",
            expected="a file that this user may read",
            fix="Allow it with chmod or chown, or correct the path",
        ) from error


def regular_size(path: Path, refused: Refusal) -> int:
    """Return the size of ``path`` in bytes.

    Raises:
        MtlExportError: What ``refused`` gives: it is a folder, or a pipe that has no end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise refused("no regular file")
    return status.st_size


def shown_path(path: Path) -> str:
    """Return ``path`` for a message; what no terminal shows is escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def decoded(data: bytes, refused: Refusal) -> str:
    """Return ``data`` as text.

    Raises:
        MtlExportError: What ``refused`` gives: it is no UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"not UTF-8 (byte {error.start})") from error


def refuse_nesting(value: Any, refused: Refusal) -> None:
    """Refuse a parsed value that nests too deep, or has too many parts.

    What is shared counts wherever it stands, so that aliases cannot multiply (YAML's can).

    Raises:
        MtlExportError: What ``refused`` gives.
    """
    count, level = 0, [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        count += len(level)
        if not level:
            return
        if count > MOST_CONTAINERS:
            raise refused(f"more than {MOST_CONTAINERS:,} lists and objects")
    raise refused(nested())


def refuse_unspeakable(value: Any, refused: Refusal) -> None:
    """Refuse a value that no message could quote: numbers of thousands of digits.

    TOML and YAML have them as ``0x...``, past the limit that Python keeps for decimal ones.

    Raises:
        MtlExportError: What ``refused`` gives.
    """
    try:
        repr(value)
    except ValueError as error:
        raise refused(HUGE) from error


def nested() -> str:
    """Return the words for a value that nests too deep."""
    return f"lists and objects nested more than {MOST_DEPTH} deep"
