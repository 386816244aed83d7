"""An object in a process of its own, whose methods are called one at a time.

Errors that a method raises there are raised here: ours and the system's as themselves, any
other as a ``RuntimeError`` with its traceback. The process is spawned, because a forked one
has the parent's memory, loggers and threads' locks; it ends with the process that started it.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from mtl_export.errors import MtlExportError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess


class ChildProcess:
    """A process, started by the first call, and anew by the first one after it has died.

    Args:
        died: Makes the error for a process that has died, from words such as ``was ended by
            SIGKILL``.
        factory: Makes the object, in the process; it is pickled.
        arguments: What it is called with.
    """

    def __init__(
        self,
        died: Callable[[str], MtlExportError],
        factory: Callable[..., object],
        *arguments: object,
    ) -> None:
        self._died, self._target = died, (factory, arguments)
        self._process: SpawnProcess | None = None
        self._link: Connection[Any, Any] | None = None

    def call(self, method: str, *values: object, hear: Callable[..., None] | None = None) -> Any:
        """Return what the object's method returns.

        Args:
            method: Its name.
            values: What it is called with.
            hear: Called with what the method reports; the method then has a last argument, a
                function that reports.

        Raises:
            MtlExportError: As the method raised it, or the process has died.
            OSError: Likewise.
            RuntimeError: It found a bug; the message is its traceback.
        """
        kind, found = self._answer((method, values, hear is not None))
        while kind == "report" and hear is not None:
            hear(*found)
            kind, found = self._answer(None)
        if kind == "error":
            raise found
        return found

    def kill(self) -> None:
        """End the process, whatever it is at; ``call``, in another thread, then fails."""
        process = self._process
        if process is not None:
            # It may have been ended and closed just now.
            with suppress(ValueError):
                process.kill()

    def close(self) -> None:
        """End the process; nothing may be called meanwhile."""
        self.kill()
        process, link = self._process, self._link
        self._process = self._link = None
        if link is not None:
            link.close()
        if process is not None:
            process.join()
            process.close()

    def _answer(self, question: object) -> tuple[str, Any]:
        """Return the next message of the process, in answer to ``question`` if there is one."""
        try:
            link = self._started()
            if question is not None:
                link.send(question)
            kind, found = link.recv()
        except (EOFError, OSError) as error:
            process, code = self._process, None
            if process is not None:
                process.join(timeout=10)
                code = process.exitcode
            self.close()
            by_signal = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else ""
            raise self._died(by_signal or f"ended with code {code}") from error
        return kind, found

    def _started(self) -> Connection[Any, Any]:
        if self._link is None:
            start = get_context("spawn")
            self._link, theirs = start.Pipe()
            self._process = start.Process(target=_serve, args=(theirs, *self._target), daemon=True)
            self._process.start()
            theirs.close()
        return self._link


def _serve(
    link: Connection[Any, Any], factory: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    """Answer the parent until it hangs up, or has died."""
    # An interrupt from the keyboard is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served: object = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, values, is_heard = link.recv()
            try:
                served = factory(*arguments) if served is None else served
                report = [lambda *heard: link.send(("report", heard))] if is_heard else []
                answer: tuple[str, Any] = ("done", getattr(served, method)(*values, *report))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (MtlExportError, OSError) as error:
                answer = ("error", error)
            except Exception:
                answer = ("error", RuntimeError(traceback.format_exc()))
            link.send(answer)
