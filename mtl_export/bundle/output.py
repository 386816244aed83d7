"""Output folders that are whole or absent: write beside the target, then swap.

    with output_folder(target, recipe=recipe, force=False) as plan:
        if not plan.up_to_date:
            write(plan.folder)

What happens to a target, in order

    absent or empty                        written
    manifest with this recipe, files whole left alone: ``up_to_date``
    manifest, but other recipe or files    refused; replaced with ``force``
    no manifest, only outputs inside it    written
    no manifest, anything else inside it   refused; written with ``force``

Only files that the old manifest lists are ever removed. Everything else in the
target (outputs of their own such as ``onnx/<task>/``, a README somebody put there)
is carried over by hard link, or copied where links do not work. The one exception is
asked for: with ``force``, a stranger's file gives way to a new one of the same name.

Where a run of the same recipe finishes first, its result stays and this one's is dropped: both
end with the same folder, ``up_to_date`` for the later one.

A block that ends in an error, a full disk or ``kill -9`` leaves the target as it was.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mtl_export.bundle.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    Recipe,
    changed_files,
    read_manifest,
    write_manifest,
)
from mtl_export.bundle.staging import held_alone, is_staging, put_in_place, staging_folder
from mtl_export.errors import IntegrityError, MtlExportError, OutputError, shortened

_FULL = ("the disk or its quota is full", "Free some space, or pass a folder on another disk")
_CLOSED = ("it cannot be written", "Pass a folder you may write to --output")
_HANDLES = ("too many files are open at once", "Raise ulimit -n")
# How long to wait for another run that puts its result in place.
_PATIENCE_S = 2.0
_WRITE_FAILURES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("a file would be larger than allowed here (ulimit -f)", _FULL[1]),
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.ENOTDIR: ("a part of its path is a file", "Pass another folder to --output"),
    errno.ENAMETOOLONG: ("its name is too long for the file system", "Pass a shorter --output"),
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.EIO: ("the disk reports an error", "Pass a folder on another disk to --output"),
}
# What libraries written in Rust say in place of errno, e.g. safetensors.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# What ndarray.tofile says in place of errno when it cannot write.
_NUMPY_FULL = re.compile(r"Not enough free space to write|requested and \d+ written")


@dataclass(slots=True)
class OutputPlan:
    """What is to be done about one output folder.

    Attributes:
        target: Where the result will lie, as the caller named it.
        folder: Where to write it now; the target itself if ``up_to_date``.
        up_to_date: The target already holds exactly this result: write nothing. Also set at
            the end of a block that another run of the same recipe has overtaken.
        known: Files in ``folder`` that the writer has hashed itself, by name; to be filled.
        beside: Files outside ``target`` that it needs (see ``Manifest``); to be filled.
    """

    target: Path
    folder: Path
    up_to_date: bool
    known: dict[str, FileEntry] = field(default_factory=dict)
    beside: dict[str, FileEntry] = field(default_factory=dict)


@contextmanager
def output_folder(
    target: Path,
    *,
    recipe: Recipe | Callable[[], Recipe],
    force: bool = False,
    estimated_size_bytes: int = 0,
    is_held: bool = False,
    option: str = "--output",
) -> Iterator[OutputPlan]:
    """Give a folder to write to, and make it ``target`` when the block ends well.

    Args:
        target: The folder to create; its parents are created too.
        recipe: What decides its bytes; goes into its manifest. A function is called when
            there is an old manifest to compare with, else at the end, when the block may
            have learnt what the recipe needs (the base's hash, from reading it).
        force: Replace an old result that is different.
        estimated_size_bytes: About what will be written; checked before the first byte.
        is_held: The caller is inside ``held_alone`` of the target.
        option: What names another target, for messages.

    Raises:
        OutputError: The target exists and differs (without ``force``), is not a
            folder, or cannot be written, or the disk is full.
        IntegrityError: Its manifest was tampered with (without ``force``).
    """
    place = target.absolute().resolve()
    try:
        _refuse_place(place, target)
        old = _old_manifest(place, force=force)
        if old is not None and old.recipe == _recipe(recipe) and not _changed(place, old):
            yield OutputPlan(target, place, up_to_date=True)
            return
        if not force:
            _refuse_difference(target, place, old, recipe)
        _refuse_full_disk(target, place, estimated_size_bytes)
        with staging_folder(place) as folder:
            # Read again: a result that a killed run had moved away is back now.
            before = _old_manifest(place, force=True)
            plan = OutputPlan(target, folder, up_to_date=False)
            yield plan
            write_manifest(folder, _recipe(recipe), plan.known, plan.beside)
            finish = partial(_finish, plan, place, before, _recipe(recipe), force=force)
            with nullcontext() if is_held else held_alone(place, patience_s=_PATIENCE_S):
                try:
                    finish()
                except OSError as error:
                    if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                        raise
                    finish()  # another run put it there since we looked
    except OutputError as error:
        path, _, rest = error.problem.partition(": ")
        is_staged = any(is_staging(part) for part in Path(path).parts)
        raise OutputError(
            f"{target}: {rest}" if is_staged else error.problem,
            expected=error.expected,
            fix=error.fix.replace("--output", option),
        ) from error
    except MtlExportError:
        raise
    except Exception as error:
        failure = _write_failure(error, place)
        if failure is None:
            raise
        raise OutputError(
            f"{target}: {failure[0]}; nothing was changed there",
            expected="a folder that can be written",
            fix=failure[1].replace("--output", option),
        ) from error


def _old_manifest(place: Path, *, force: bool) -> Manifest | None:
    try:
        return read_manifest(place)
    except IntegrityError:
        if force:
            return None
        raise


def _changed(place: Path, old: Manifest) -> list[str]:
    # What lies beside is put right by who wrote it; this folder need not be written for it.
    return changed_files(place, old.files)


def _listed(manifest: Manifest | None) -> frozenset[str]:
    return frozenset(manifest.files if manifest else ()) | {MANIFEST_FILE}


def _refuse_place(place: Path, target: Path) -> None:
    found = ""
    if place.exists() and not place.is_dir():
        found = "it is a file"
    elif Path.cwd().is_relative_to(place):
        found = "it is the current folder, or holds it"
    elif os.path.ismount(place):
        found = "it is a mount point"
    if found:
        raise OutputError(
            f"{target}: {found}",
            expected="a folder that can be swapped for the finished result",
            fix=f"Pass a folder inside or beside it, such as --output {target / 'export'}"
            if place.is_dir()
            else "Pass another folder to --output",
        )


def _recipe(recipe: Recipe | Callable[[], Recipe]) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else recipe()


def _refuse_difference(
    target: Path, place: Path, old: Manifest | None, recipe: Recipe | Callable[[], Recipe]
) -> None:
    if not place.exists():
        return
    if old is not None:
        changes = _recipe(recipe).differences(old.recipe) or _changed(place, old)
        raise OutputError(
            f"{target}: it holds another result: {shortened(changes)}",
            expected="an absent folder, or the result of this very command",
            fix="Pass --force to replace it, or another folder to --output",
        )
    foreign = [
        child.name
        for child in sorted(place.iterdir())
        if not is_staging(child.name) and not (child / MANIFEST_FILE).is_file()
    ]
    if foreign:
        raise OutputError(
            f"{target}: it holds files of others: {shortened(foreign)}",
            expected="an absent or empty folder, or one that mtl-export wrote",
            fix="Pass another folder to --output, or --force to write among them",
        )


def _finish(
    plan: OutputPlan, place: Path, before: Manifest | None, recipe: Recipe, *, force: bool
) -> None:
    """Put what was written in place, unless another run of ``recipe`` has put its own there."""
    if place.exists():
        now = _old_manifest(place, force=True)
        if now is not None and now.recipe == recipe and not _changed(place, now):
            plan.folder, plan.up_to_date = place, True
            return
        _refuse_overtaken(plan.target, now, before, recipe)
        _carry_over(place, plan.folder, _listed(now), plan.target, force=force)
    put_in_place(plan.folder, place)


def _refuse_overtaken(
    target: Path, now: Manifest | None, before: Manifest | None, recipe: Recipe
) -> None:
    """Refuse to replace what another run put there since ``before`` was read."""
    if now is None or now.recipe in (recipe, before.recipe if before else None):
        return
    raise OutputError(
        f"{target}: another run wrote it while this one was at work",
        expected="what was there when this run began, because what that run did would be lost",
        fix="Look at it, and run the command again",
    )


def _refuse_full_disk(target: Path, place: Path, estimated_size_bytes: int) -> None:
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if estimated_size_bytes > free_bytes:
        raise OutputError(
            f"{target}: {_size_text(free_bytes)} are free",
            expected=(
                f"about {_size_text(estimated_size_bytes)}, because an old result is kept until "
                "the new one is whole"
            ),
            fix=_FULL[1],
        )


def _size_text(size_bytes: int) -> str:
    # Below 0.1 MB the two sizes would read alike.
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"


def _carry_over(
    source: Path, destination: Path, listed: frozenset[str], target: Path, *, force: bool
) -> None:
    """Link everything in ``source`` that ``listed`` does not name into ``destination``.

    Names in ``listed`` are relative to ``source``, with ``/``.
    """
    for child in sorted(source.iterdir()):
        new = destination / child.name
        if child.is_dir() and not child.is_symlink():
            inside = _inside(child.name, listed)
            if inside and not _holds_others(child, inside):
                continue
            if os.path.lexists(new) and not new.is_dir():
                raise _in_the_way(target / child.name, "a folder")
            new.mkdir(exist_ok=True)
            _carry_over(child, new, inside, target, force=force)
        elif child.name in listed:
            continue
        elif not os.path.lexists(new):
            _link_or_copy(child, new)
        elif not force:
            raise _in_the_way(target / child.name, "a file")


def _in_the_way(path: Path, kind: str) -> OutputError:
    return OutputError(
        f"{path}: {kind} that mtl-export did not write is in the way of a new file",
        expected="that name to be free",
        fix="Move it away, or pass another folder to --output",
    )


def _inside(folder: str, listed: frozenset[str]) -> frozenset[str]:
    prefix = f"{folder}/"
    return frozenset(name.removeprefix(prefix) for name in listed if name.startswith(prefix))


def _holds_others(folder: Path, listed: frozenset[str]) -> bool:
    return any(
        path.relative_to(folder).as_posix() not in listed
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _link_or_copy(source: Path, destination: Path) -> None:
    if source.is_symlink():
        destination.symlink_to(os.readlink(source))
        return
    try:
        os.link(source, destination)
    except OSError:
        # Not every file system has links, and some forbid linking others' files.
        shutil.copy2(source, destination)


def _write_failure(error: Exception, place: Path) -> tuple[str, str] | None:
    """Return what is wrong with the output place and what to do, or None if it is not that."""
    code: int | None = None
    if isinstance(error, OSError):
        code = error.errno
        paths = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name]
        if any(_is_ours(path, place) for path in paths):
            return _WRITE_FAILURES.get(code or 0, (str(error.strerror), _CLOSED[1]))
        if paths:
            return None  # reading a source failed, not writing the result
    elif match := _RUST_ERROR.search(str(error)):
        code = int(match[1])
    if code is None and isinstance(error, OSError) and _NUMPY_FULL.search(str(error)):
        return _FULL
    return _WRITE_FAILURES.get(code or 0)


def _is_ours(path: Path, place: Path) -> bool:
    """Return whether ``path`` is the place, inside it, above it, or being staged for it."""
    path = path.absolute()
    staged = path.is_relative_to(place.parent) and any(map(is_staging, path.parts))
    return path.is_relative_to(place) or place.is_relative_to(path) or staged
