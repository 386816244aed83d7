"""SHA-256 of files, written the way ``sha256sum`` prints it so that anyone can re-check.

Hashing a base of several gigabytes takes longer than copying it, and every command needs
the hash. It is therefore kept, under the file's identity and times, in
``$XDG_CACHE_HOME/mtl-export/sha256`` (``~/.cache``). Only bases use that; what is verified
is always read.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

# Smaller files are hashed faster than looked up.
CACHED_BYTES = 64 << 20
SETTLED_S = 2.0


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


def cached_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a large file from an earlier run, if the file is the same still.

    It is the same if device, inode, size, and the times of its last change of content and
    of status (which no program can set) are. Another file's or an unreadable entry is none.
    """
    entry = _entry(path)
    if entry is None:
        return None
    try:
        found = entry.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch(r"[0-9a-f]{64}", found) else None


def remember_sha256(path: Path, digest: str) -> None:
    """Keep ``path``'s hash for later runs, if it is a large file that was not just changed."""
    entry = _entry(path)
    # Within the clock's resolution of a change, a second change would go unnoticed.
    if entry is None or time.time() - path.stat().st_ctime < SETTLED_S:
        return
    partial = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"{digest}\n", encoding="ascii")
        os.replace(partial, entry)
    except OSError:
        return  # a cache that cannot be written is only slower


def _entry(path: Path) -> Path | None:
    """Return where the hash of ``path`` as it is now is kept; None for small files."""
    stat = path.stat()
    if stat.st_size < CACHED_BYTES:
        return None
    facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mtl-export" / "sha256" / name


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
