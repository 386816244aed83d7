"""Weight files that several merged tasks refer to, each set in a folder named for its content.

    <parent>/_shared/<id>/    id: begin of the SHA-256 over names and hashes of its files
    <parent>/<task>/          its index and manifest point to ../_shared/<id>/

What such a folder holds never changes: a merge that shares other tensors writes a folder of
another name, so tasks merged before keep theirs. A merge ends by removing the folders that no
output beside ``_shared`` refers to; where another run is writing at that moment, or it is
killed, the next merge does. Earlier versions kept one set of files in ``_shared`` itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mtl_export.bundle.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    changed_files,
    read_manifest,
)
from mtl_export.bundle.staging import held_alone, is_staging
from mtl_export.errors import IntegrityError, OutputError

# No task can have this name: task names begin with a letter or digit.
SHARED_FOLDER = "_shared"
# Hex digits of an id; two contents of one parent folder that meet in these do not exist.
ID_DIGITS = 16


@dataclass(frozen=True)
class SharedFiles:
    """Shared weight files, whole.

    Attributes:
        folder: Where they lie.
        files: By name.
    """

    folder: Path
    files: Mapping[str, FileEntry]

    @property
    def name(self) -> str:
        """Return the folder that content has, seen from the folder of all tasks."""
        lines = [f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items())]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return f"{SHARED_FOLDER}/{digest[:ID_DIGITS]}"

    @property
    def reference(self) -> str:
        """Return the same seen from a task's folder, ending in ``/``."""
        return f"../{self.name}/"

    @property
    def beside(self) -> dict[str, FileEntry]:
        """Return what a task's manifest says of them."""
        return {f"{self.reference}{name}": entry for name, entry in self.files.items()}


def whole_files(
    folders: Sequence[Path], names: Sequence[str], *, is_linked: bool
) -> SharedFiles | None:
    """Return the shared files that tasks' folders have or refer to; None if none has all.

    Args:
        folders: Folders that are as their manifests say.
        names: The shared files.
        is_linked: They lie in the folders, and not beside them.
    """
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        if is_linked:
            files = {name: manifest.files[name] for name in names if name in manifest.files}
            found = SharedFiles(folder, files)
        else:
            files = {Path(name).name: entry for name, entry in manifest.beside.items()}
            unplaced = SharedFiles(folder, files)
            found = SharedFiles(folder.parent / unplaced.name, files)
            if manifest.beside != unplaced.beside or not is_whole(found.folder, files):
                continue
        if found.files.keys() == {*names}:
            return found
    return None


def is_whole(folder: Path, files: Mapping[str, FileEntry]) -> bool:
    """Return whether ``folder`` is an output that holds these files, and no other is listed."""
    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        return False
    return manifest is not None and manifest.files == files and not changed_files(folder, files)


def remove_unused(parent: Path) -> None:
    """Remove the shared folders in ``parent`` that no output there refers to."""
    root = parent / SHARED_FOLDER
    if not root.is_dir() or root.is_symlink():
        return
    # What cannot be told or removed stays, and so does all while another run writes here.
    with suppress(OutputError, IntegrityError, OSError), held_alone(parent.absolute().resolve()):
        used = _used(parent)
        for folder in (*sorted(root.iterdir()), root):
            if folder.is_dir() and not is_staging(folder.name) and folder.resolve() not in used:
                _remove(folder)
        root.rmdir()


def _used(parent: Path) -> set[Path]:
    used = set()
    for child in parent.iterdir():
        manifest = read_manifest(child) if child.is_dir() and child.name != SHARED_FOLDER else None
        if manifest is None:
            continue
        used |= {(child / name).parent.resolve() for name in manifest.beside}
        if not manifest.beside and manifest.recipe.options.get("shared_by") == "reference":
            used.add((parent / SHARED_FOLDER).resolve())
    return used


def _remove(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None or not _is_shared(manifest):
        return
    for name in manifest.files:
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST_FILE).unlink()
    with suppress(OSError):  # somebody's own file is in it
        folder.rmdir()


def _is_shared(manifest: Manifest) -> bool:
    recipe = manifest.recipe
    return recipe.command == "merge" and recipe.options.get("task") == SHARED_FOLDER
