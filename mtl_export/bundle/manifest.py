"""What made an output folder: recipe and file hashes, in ``mtl-export.json``.

Every finished folder carries one, so that the folder alone says where it came from,
a repeated command can tell that nothing is left to do, and anyone can check it with
``sha256sum``. UTF-8 JSON, one object with these keys and no other

    schema         "mtl-export.output/1"
    tool_version   version of mtl-export that wrote the folder
    command        the verb: "merge", "onnx", "trt"
    options        {name: value}, those that change the bytes
    sources        {name: SHA-256}, what it was made from: base_sha256, checkpoint_sha256
    files          {path relative to the folder, with "/": {"sha256": hex, "size_bytes": int}}
    beside         the same, by paths that begin with "../": files that the folder needs and
                   that lie outside it; absent where there are none
    manifest_sha256  SHA-256 of all the rest, as it is written here: an edit of a single value
                   breaks it. Who writes a new one passes: only a digest of the whole file that
                   was handed on another way (``verify --expect``) tells who wrote it.

Keys are sorted; there is no timestamp and no absolute path, so the same recipe
gives the same bytes. The manifest does not list itself, nor a folder inside that
is an output of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtl_export.checkpoint.files.contained import contained, is_file
from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import IntegrityError

MANIFEST_FILE = "mtl-export.json"
SCHEMA = "mtl-export.output/1"
OptionValue = str | int | float | bool | None | list[str] | dict[str, str]
_BESIDE = "beside"
_DIGEST = "manifest_sha256"
_FILES: Shape = {str: {"sha256": str, "size_bytes": int}}
_SHAPE: Shape = {
    "schema": str,
    "tool_version": str,
    "command": str,
    "options": {str: (str, int, float, bool, None, [str], {str: str})},
    "sources": {str: str},
    "files": _FILES,
    "beside?": _FILES,
    _DIGEST: str,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of an output folder.

    Attributes:
        command: The verb that writes it.
        options: The options that change its bytes, by name.
        sources: SHA-256 of what it is made from, by name.
        tool_version: Version of mtl-export.
    """

    command: str
    options: Mapping[str, OptionValue]
    sources: Mapping[str, str]
    tool_version: str

    def differences(self, other: Recipe) -> list[str]:
        """Return what changed from ``other`` to this recipe, one phrase each, sorted."""
        before, after = other._flat(), self._flat()
        return [
            f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]

    def _flat(self) -> dict[str, OptionValue]:
        return {
            "command": self.command,
            "tool_version": self.tool_version,
            **self.options,
            **self.sources,
        }


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an output folder.

    Attributes:
        sha256: 64 hex digits.
        size_bytes: Its size.
    """

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A read ``mtl-export.json``.

    Attributes:
        recipe: What made the folder.
        files: By path relative to the folder, with ``/``.
        beside: Files outside the folder that it needs, by path that begins with ``../``.
    """

    recipe: Recipe
    files: Mapping[str, FileEntry]
    beside: Mapping[str, FileEntry] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of ``folder``, or None if the folder has none.

    Raises:
        IntegrityError: The file is there but is not one of ours, or was edited into
            something unusable.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    fix = f"Restore it, or delete {MANIFEST_FILE} and run again with --force"
    document = read_json(path, _SHAPE, error=IntegrityError, fix=fix)
    try:
        return _parsed(document)
    except ValueError as error:
        raise IntegrityError(
            f"{path}: not a manifest this version can read ({error})",
            expected=(
                f'an object with schema "{SCHEMA}", because it decides which files of the folder '
                "may be replaced"
            ),
            fix=fix,
        ) from error


def write_manifest(
    folder: Path,
    recipe: Recipe,
    known: Mapping[str, FileEntry] = MappingProxyType({}),
    beside: Mapping[str, FileEntry] = MappingProxyType({}),
) -> Manifest:
    """Hash what ``folder`` holds, write its manifest, and return it.

    Args:
        folder: The folder.
        recipe: What made it.
        known: Files that need not be hashed, because who wrote them did, by name.
        beside: As in ``Manifest``.
    """
    names = (path.relative_to(folder).as_posix() for path in own_files(folder))
    files = {name: _entry(folder / name, known.get(name)) for name in names}
    return _write(folder, Manifest(recipe, files, beside))


def add_to_manifest(folder: Path, name: str) -> Manifest:
    """List a file that was added to a finished folder, and return the manifest.

    Raises:
        IntegrityError: The folder has no manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise IntegrityError(
            f"{folder}: no {MANIFEST_FILE}",
            expected="a folder that mtl-export wrote, because what is added is listed there",
            fix="Export it again",
        )
    files = {**manifest.files, name: _entry(folder / name, None)}
    return _write(folder, replace(manifest, files=files))


def _write(folder: Path, manifest: Manifest) -> Manifest:
    recipe = manifest.recipe
    document: dict[str, object] = {
        "schema": SCHEMA,
        "tool_version": recipe.tool_version,
        "command": recipe.command,
        "options": dict(recipe.options),
        "sources": dict(recipe.sources),
        "files": _listed(manifest.files),
    }
    if manifest.beside:
        document[_BESIDE] = _listed(manifest.beside)
    document[_DIGEST] = _digest(document)
    partial = folder / f"{MANIFEST_FILE}.partial"
    partial.write_bytes(_bytes(document))
    partial.replace(folder / MANIFEST_FILE)
    return manifest


def _bytes(document: Mapping[str, object]) -> bytes:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode()


def _digest(document: Mapping[str, object]) -> str:
    rest = {name: value for name, value in document.items() if name != _DIGEST}
    return hashlib.sha256(_bytes(rest)).hexdigest()


def _listed(files: Mapping[str, FileEntry]) -> dict[str, dict[str, str | int]]:
    return {
        name: {"sha256": entry.sha256, "size_bytes": entry.size_bytes}
        for name, entry in files.items()
    }


def _entry(path: Path, known: FileEntry | None) -> FileEntry:
    size = path.stat().st_size
    if known is not None and known.size_bytes == size:
        return known
    return FileEntry(sha256_of_file(path), size)


def damage(
    folder: Path, manifest: Manifest, hash_of: Callable[[Path], str] | None = None
) -> list[str]:
    """Return what no longer agrees with ``manifest``, one phrase per file, sorted.

    Args:
        folder: Its folder.
        manifest: What was written.
        hash_of: Returns a file's SHA-256; None to read it.
    """
    return changed_files(folder, {**manifest.files, **manifest.beside}, hash_of)


def changed_files(
    folder: Path, files: Mapping[str, FileEntry], hash_of: Callable[[Path], str] | None = None
) -> list[str]:
    """Return which of ``files`` are not in ``folder`` as they were, a phrase each, sorted."""
    hash_of = hash_of or sha256_of_file
    problems = []
    for name, entry in sorted(files.items()):
        path = folder / name
        if not is_file(path):
            problems.append(f"{name} is missing")
        elif not _is_held(folder, name):
            problems.append(f"{name} is a link to a file elsewhere")
        elif path.stat().st_size != entry.size_bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {entry.size_bytes}")
        elif hash_of(path) != entry.sha256:
            problems.append(f"{name} has changed")
    return problems


def _is_held(folder: Path, name: str) -> bool:
    """Return whether a file that is there lies where its name says; the hub cache's links do."""
    root, inner = (folder / "..", name[3:]) if name.startswith("../") else (folder, name)
    try:
        contained(root, inner, where=name)
    except IntegrityError:
        return False
    return True


def own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of ``folder`` in name order, without outputs nested inside it."""
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            if not (child / MANIFEST_FILE).is_file():
                yield from own_files(child)
        elif child.name != MANIFEST_FILE:
            yield child


def _parsed(document: Mapping[str, Any]) -> Manifest:
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}")
    if document[_DIGEST] != _digest(document):
        raise ValueError(f"its {_DIGEST} is not that of the rest: it was edited or damaged")
    files, beside = _entries(document["files"]), _entries(document.get(_BESIDE) or {})
    unsafe = [name for name in files if not _is_inside(name)]
    # One folder up and no further: what lies beside is of the same run.
    unsafe += [n for n in beside if n[:3] != "../" or not _is_inside(n[3:])]
    if unsafe:
        raise ValueError(f"paths outside the folder: {unsafe}")
    recipe = Recipe(
        command=document["command"],
        options=document["options"],
        sources=document["sources"],
        tool_version=document["tool_version"],
    )
    return Manifest(recipe, files, beside)


def _entries(listed: Mapping[str, Any]) -> dict[str, FileEntry]:
    return {name: FileEntry(entry["sha256"], entry["size_bytes"]) for name, entry in listed.items()}


def _is_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in Path(name).parts
