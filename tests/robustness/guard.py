"""What a reader may not do, watched while it runs: write, start or reach anything elsewhere.

Python reports what it opens, moves, starts and connects to as audit events; libraries that
work below it are caught by what lies in the folder beside. Memory is the peak of the process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 2 << 30
# Beyond this the system refuses memory, so that one input cannot take the machine down.
ADDRESS_LIMIT_BYTES = 6 << 30
STARTS = frozenset({
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.kill",
})  # fmt: skip
CHANGES = frozenset({
    "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.mkfifo", "os.mknod",
})  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SYSTEM_BAIT = "/etc/hostname"
DEVICES = ("/dev/", "/proc/self/")


class Hang(BaseException):
    """The reader ran longer than ``TIME_LIMIT_S``."""


class _Watch:
    def __init__(self) -> None:
        self.place: str | None = None
        self.seen: list[str] = []
        self.has_hung = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.place is None:
            return
        if event in STARTS:
            self.seen.append(f"{event} {str(arguments)[:80]}")
        elif event == "open" or event in CHANGES:
            place, self.place = self.place, None  # what is asked below is ours
            try:
                self._look(event, arguments, place)
            finally:
                self.place = place

    def _look(self, event: str, arguments: tuple[Any, ...], place: str) -> None:
        named = [one for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
        paths = [os.fsdecode(one) for one in named[: 1 if event == "open" else 2]]
        is_write = event != "open" or bool((arguments[2] or 0) & WRITES)
        # Those that take a folder's descriptor name it last.
        holder = arguments[-1] if event in {"os.remove", "os.rmdir"} else -1
        for path in paths:
            real = os.path.realpath(path if holder == -1 else f"/proc/self/fd/{holder}/{path}")
            is_inside = real == place or real.startswith(f"{place}/")
            if is_write and not is_inside and not real.startswith(DEVICES):
                self.seen.append(f"{event} {path}")
            elif real == SYSTEM_BAIT or real.startswith(f"{os.path.dirname(place)}/outside/"):
                self.seen.append(f"read of {path}")


_watch = _Watch()
_is_installed = False


@contextmanager
def watched(place: Path) -> Iterator[list[str]]:
    """Give the list that fills with what is done outside of ``place`` during the block.

    A folder ``outside`` beside ``place`` is bait: who opens what is in it left its own folder.

    Raises:
        Hang: After ``TIME_LIMIT_S``.
    """
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_watch)
        _is_installed = True
    before = _listing(place.parent)
    _watch.seen, _watch.has_hung = [], False
    seen = _watch.seen
    old = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    _watch.place = os.path.realpath(place)
    try:
        yield seen
    finally:
        _watch.place = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        changed = _listing(place.parent) ^ before
        seen += [f"changed {name}" for name, _, _ in sorted(changed)]


def _stop(number: int, frame: FrameType | None) -> None:
    _watch.has_hung = True  # some readers turn whatever they get into an error of ours
    raise Hang


def has_hung() -> bool:
    """Return whether the last block ran into the limit of time."""
    return _watch.has_hung


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    return {
        (os.path.relpath(entry.path, folder), entry.stat().st_size, entry.stat().st_mtime_ns)
        for one in (folder, folder / "outside")
        for entry in os.scandir(one)
        if entry.is_file(follow_symlinks=False)
    }


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Have the system refuse more than ``ADDRESS_LIMIT_BYTES`` above what is taken now."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_LIMIT_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def reset_peak() -> int:
    """Forget the peak of memory so far; return what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that was resident since ``reset_peak``."""
    return _status("VmHWM")


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
