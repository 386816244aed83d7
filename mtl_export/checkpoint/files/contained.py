"""A name that a file gives -> the file it may mean: one in its own folder, or none.

An index names shards, a graph names its external data, a folder holds links. Whoever writes
those could otherwise have any file of this machine copied into an export. Allowed are files
in the folder, links to such, and what the Hugging Face hub's cache is made of:
``models--ORG--NAME/snapshots/REVISION/FILE`` is a link to ``models--ORG--NAME/blobs/HASH``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from mtl_export.errors import IntegrityError

# What checkpoints are read from.
_READ = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml"})


def contained(folder: Path, name: str, *, where: str) -> Path:
    """Return the file ``name`` of ``folder``; it need not be there.

    Args:
        folder: The folder that may be read.
        name: A path from it, parts joined by ``/``.
        where: What gives the name, for the message.

    Raises:
        IntegrityError: It lies outside.
    """
    parts = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    is_inside = bool(name) and "\0" not in name and ".." not in parts.parts and not parts.anchor
    if is_inside and not PurePosixPath(name).is_absolute():
        path = folder / name
        try:
            real, root = path.resolve(), folder.resolve()
        except (OSError, RuntimeError):  # a link that leads to itself
            real = root = Path()
        if real != root and (real.is_relative_to(root) or real.parent == _blobs_of(root)):
            return path
    raise IntegrityError(
        f"{where}: {name!r} lies outside {folder}",
        expected=(
            "a file in that folder, because a file from elsewhere could otherwise have any file "
            "of this machine copied"
        ),
        fix=f"Copy the file that you mean into {folder}",
    )


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file; a name that the system cannot have is none."""
    with suppress(OSError):  # longer than names may be
        return path.is_file()
    return False


def check_links(folder: Path) -> None:
    """Refuse a checkpoint folder with a link to a file outside it, two levels deep.

    A link to a folder is followed, and its files are held to that folder.

    Raises:
        IntegrityError: There is one.
    """
    for inner in _folders(folder, 2):
        children = []
        with suppress(PermissionError):
            children = sorted(inner.iterdir())
        for child in children:
            if child.suffix in _READ and child.is_symlink() and not child.is_dir():
                try:
                    contained(inner, child.name, where=str(child))
                except IntegrityError:
                    contained(folder, child.relative_to(folder).as_posix(), where=str(child))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    with suppress(PermissionError):  # the reader, if it wants that folder, says so
        for child in sorted(folder.iterdir()) if depth else ():
            if child.is_dir():
                yield from _folders(child, depth - 1)


def _blobs_of(root: Path) -> Path | None:
    """Return where the files of a folder in the hub's cache lie; None for other folders."""
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith("models--"):
            return parent.parents[1] / "blobs"
    return None
