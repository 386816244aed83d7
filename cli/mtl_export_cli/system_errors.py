"""What the operating system refuses: files that cannot be read, streams that take nothing, memory.

None is a bug: files of another user, a disk that fails, ``> /dev/full`` and ``ulimit -v`` are
mended by whoever typed the command.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from mtl_export.errors import UsageError

_ALLOWED = (
    "a file or folder that this user may use",
    "Allow it with chmod or chown, or run as the user whose it is",
)
_SPACE = ("room for what is written", "Free some space")
_DEVICE = ("a device that answers", "Look at the disk, or copy the file to another one")
_NAME = ("a path that the file system can follow", "Correct the path")
_HANDLES = ("files that may be opened at once", "Raise ulimit -n")
# errno -> what was expected, what to do. Any other may be a bug and keeps its traceback.
_REFUSALS: dict[int, tuple[str, str]] = {
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.EROFS: _ALLOWED,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EIO: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ENAMETOOLONG: _NAME,
    errno.ELOOP: _NAME,
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
}


# What Python, the loader of libraries, torch and C++ say when no memory is left.
_NO_MEMORY = re.compile(
    "can't start new thread|failed to map segment|[Cc]annot allocate memory|can't allocate memory"
    "|std::bad_alloc|not enough memory"
)


def refusal_of(error: BaseException) -> UsageError | None:
    """Return our error for a file or memory that the system refused, or None if it is not that."""
    if _is_of_memory(error):
        said = _NO_MEMORY.search(str(error))
        return UsageError(
            f"memory: the system gives no more ({said[0] if said else type(error).__name__})",
            expected="memory and threads for the work",
            fix="Raise ulimit -v and ulimit -u, or run it where more is free",
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):
        # What pathlib makes of ELOOP before Python 3.13.
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(error).partition("'")[2][:-1])
    if not isinstance(error, OSError) or error.filename is None:
        return None
    known = _REFUSALS.get(error.errno or 0)
    if known is None:
        return None
    path = error.filename
    return UsageError(
        f"{str(path) if isinstance(path, int) else os.fsdecode(path)}: the system refused it ("
        f"{error.strerror})",
        expected=known[0],
        fix=known[1],
    )


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError) and bool(_NO_MEMORY.search(str(error)))


def prepare_streams() -> None:
    """Take what the shell closed (``>&-``) for ``/dev/null``, and let any name be printed.

    Else the next file that is opened would be written to by whoever prints; and names of files
    need not be text in the terminal's encoding.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Opened for as long as the process lives, at the lowest number: the closed one's.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_of_stream(error: BaseException) -> bool:
    """Return whether ``error`` comes from stdout or stderr, or a file that names itself as little.

    What a stream that buffers did not take is in it still; of others only the reason is known.
    """
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO} or bool(unwritable_streams())


def unwritable_streams() -> dict[str, TextIO]:
    """Return stdout and stderr, by name, as far as they take nothing or are only to be read."""
    found = {}
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        try:
            stream.flush()
            with suppress(io.UnsupportedOperation):  # it stands for no file
                os.write(stream.fileno(), b"")
        except OSError:
            found[name] = stream
    return found


def silence(stream: TextIO) -> None:
    """Let ``stream`` end nowhere, so that Python does not complain of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
