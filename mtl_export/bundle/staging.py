"""A folder written beside its target and put in place in one step.

    .NAME.mtl-export-XXXXXXXX        being written, or (after the exchange) the old content
    .NAME.mtl-export-XXXXXXXX.old    the old content, where the system cannot exchange folders

Both lie beside NAME, on the same file system. Who writes one holds a lock on it
(``flock`` on the folder, so no lock file is left behind, and the kernel lets go when
the process dies however it dies). A folder of that name nobody holds is the rest
of a killed run: it is removed, or put back where the kill fell between two renames.

A writer also shares a lock on the folder its target lies in, and a swap of a folder
takes that lock alone: an output cannot be swapped away while another run writes
inside it. Where the system has no ``flock``, nothing is locked and no rest removed.

Not done: ``fsync``. A killed process loses nothing; a power cut may, and then the
hashes in the manifest say so.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from mtl_export.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STAGING_NAME = re.compile(r"\.(?P<target>.+)\.mtl-export-[0-9a-f]{8}(?P<old>\.old)?")
# linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside ``target`` for the block, and remove what is left of it after.

    Args:
        target: Absolute; its parents are created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent, exclusive=False, wait=True):
        remove_stale(target.parent)
        folder, lock = _new_folder(target)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            with suppress(OSError):
                _remove_sparingly(folder)


def _remove_sparingly(folder: Path) -> None:
    """Remove a folder with one open file at a time: rmtree wants several, and ignores if not."""
    for name in os.listdir(folder):
        child = folder / name
        if child.is_dir() and not child.is_symlink():
            _remove_sparingly(child)
        else:
            child.unlink()
    folder.rmdir()


@contextmanager
def resumable_folder(
    target: Path, is_wanted: Callable[[Path], bool]
) -> Iterator[Callable[[], Path]]:
    """Give a staging folder that can be a killed run's, and is only made when asked for.

    An interrupt from the keyboard leaves it behind, as a kill does; the next run that
    writes in the same place and does not take it up removes it.

    Args:
        target: Absolute.
        is_wanted: Whether the rest of a killed run is what this run would write.

    Yields:
        A function that returns the folder: always the same, made with its parents at the
        first call if there was no rest.
    """
    with ExitStack() as stack:
        held: list[Path] = []

        def hold(folder: Path, lock: int | None) -> Path:
            if lock is not None:
                stack.callback(os.close, lock)
            held.append(folder)
            return folder

        def folder() -> Path:
            if held:
                return held[0]
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(target.parent, exclusive=False, wait=True))
            return hold(*_new_folder(target))

        if target.parent.is_dir():
            stack.enter_context(locked(target.parent, exclusive=False, wait=True))
            if rest := _rest(target, is_wanted):
                hold(*rest)
            remove_stale(target.parent)
        try:
            yield folder
        except KeyboardInterrupt:
            raise
        except BaseException:
            _remove_all(held)
            raise
        else:
            _remove_all(held)


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; an old ``target`` ends up at ``folder`` or is gone.

    Raises:
        OSError: It could not be renamed; the old target is where it was.
    """
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        old = folder.with_name(folder.name + ".old")
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def held_alone(target: Path, *, patience_s: float = 0.0) -> Iterator[None]:
    """Keep other runs from writing inside ``target`` during the block.

    Args:
        target: The folder.
        patience_s: How long to wait for one that writes there now; a swap takes no time.

    Raises:
        OutputError: One is writing there now.
    """
    if not target.is_dir():
        yield
        return
    give_up_s = monotonic() + patience_s
    while is_locked(target) and monotonic() < give_up_s:
        sleep(0.02)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(target, exclusive=True, wait=False))
        except BlockingIOError as error:
            raise OutputError(
                f"{target}: another run is writing inside it",
                expected="to be the only one",
                fix="Wait for it to end and run the command again",
            ) from error
        remove_stale(target)
        yield


def remove_stale(parent: Path) -> None:
    """Remove what killed runs left in ``parent``; put an old result back where one did."""
    if fcntl is None:
        return
    for child in sorted(parent.iterdir()):
        match = _STAGING_NAME.fullmatch(child.name)
        if not match or child.is_symlink() or not child.is_dir():
            continue
        try:
            lock = _lock(child, exclusive=True, wait=False)
        except BlockingIOError:
            continue
        if lock is None:
            continue
        try:
            if match["old"] and not (parent / match["target"]).exists():
                os.rename(child, parent / match["target"])
            else:
                shutil.rmtree(child, ignore_errors=True)
        finally:
            os.close(lock)


def is_staging(name: str) -> bool:
    """Return whether ``name`` is one that this file gives out."""
    return _STAGING_NAME.fullmatch(name) is not None


def is_locked(folder: Path) -> bool:
    """Return whether a run that is alive holds ``folder``."""
    try:
        lock = _lock(folder, exclusive=True, wait=False)
    except BlockingIOError:
        return True
    if lock is not None:
        os.close(lock)
    return False


def _rest(target: Path, is_wanted: Callable[[Path], bool]) -> tuple[Path, int | None] | None:
    """Return what a killed run left for ``target`` and is wanted, locked."""
    for child in sorted(target.parent.iterdir()):
        match = _STAGING_NAME.fullmatch(child.name)
        if not match or match["target"] != target.name or match["old"] or not child.is_dir():
            continue
        try:
            lock = _lock(child, exclusive=True, wait=False)
        except BlockingIOError:
            continue
        if is_wanted(child):
            return child, lock
        if lock is not None:
            os.close(lock)
    return None


def _new_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        folder = target.with_name(f".{target.name}.mtl-export-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = _lock(folder, exclusive=True, wait=True)
        # Another run may have taken the folder for a rest before the lock was had.
        if folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


@contextmanager
def locked(folder: Path, *, exclusive: bool, wait: bool) -> Iterator[None]:
    """Lock ``folder`` for the block, where the system can."""
    lock = _lock(folder, exclusive=exclusive, wait=wait)
    while lock is not None and not _is_still(folder, lock):
        os.close(lock)  # the folder was swapped while we waited for the one it was
        lock = _lock(folder, exclusive=exclusive, wait=wait)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, exclusive: bool, wait: bool) -> int | None:
    """Return a descriptor that holds the lock, or None where folders cannot be locked.

    Raises:
        BlockingIOError: Another run holds it, and ``wait`` is false.
    """
    if fcntl is None:
        return None
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _is_still(folder: Path, descriptor: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    return False
