"""SHA-256 of files, written the way ``sha256sum`` prints it so that anyone can re-check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest_by_blocks(path)
        )


def _digest_by_blocks(path: Path) -> str:
    # Python 3.10 has no hashlib.file_digest.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Return one SHA-256 for several files.

    One file: its own hash. Several: the hash of what
    ``sha256sum $(ls | sort)`` prints in their folder, so the order given here
    does not matter and the result can be repeated from a shell.
    """
    return sha256_of_digests({path.name: sha256_of_file(path) for path in paths})


def sha256_of_digests(digests: Mapping[str, str]) -> str:
    """Return what ``sha256_of_files`` would, from each file's own SHA-256 by file name."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
