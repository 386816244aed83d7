"""Where engines are built one after the other: in this process, or in one of its own.

Both take the same call and fail with the same errors. A process that dies while it builds
(the parser can abort on a graph it dislikes, and the system kills what takes too much
memory) is an ``EngineBuildError`` of that engine; the next one gets a new process.
"""

from __future__ import annotations

import signal
import traceback
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from mtl_export import errors
from mtl_export.errors import EngineBuildError, MtlExportError
from mtl_export.tensorrt.callbacks import Progress
from mtl_export.tensorrt.manifest import manifest_path
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.refit import RefitBuilds
from mtl_export.tensorrt.structure_cache import SharedBuilds

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

# The least time between two reports of one build.
REPORT_S = 0.1


class EngineWorker(Protocol):
    """Builds one engine at a time."""

    def build(
        self, onnx_path: Path, engine_path: Path, *, options: BuildOptions, progress: Progress
    ) -> None:
        """Write the engine of ``onnx_path`` and its manifest.

        Raises:
            MtlExportError: It could not be built or written.
        """


class LocalWorker:
    """Builds in the calling process.

    Args:
        library_name: ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        BackendMissingError: It cannot build here.
    """

    def __init__(self, library_name: str) -> None:
        self._builds, self._refits = SharedBuilds(library_name), RefitBuilds(library_name)

    def build(
        self, onnx_path: Path, engine_path: Path, *, options: BuildOptions, progress: Progress
    ) -> None:
        """Build here and now."""
        builds = self._refits if options.refit else self._builds
        manifest = builds.build(onnx_path, engine_path, options=options, progress=progress)
        manifest.write(manifest_path(engine_path))


class WorkerProcess:
    """Builds in a process of its own, started when there is something to build.

    Args:
        library_name: ``tensorrt`` or ``tensorrt_rtx``.
    """

    def __init__(self, library_name: str) -> None:
        self._library_name = library_name
        self._process: SpawnProcess | None = None
        self._link: Connection[Any, Any] | None = None

    def build(
        self, onnx_path: Path, engine_path: Path, *, options: BuildOptions, progress: Progress
    ) -> None:
        """Have the process build, and wait for it.

        Raises:
            MtlExportError: As the process raised it, or it has died.
            OSError: Likewise.
            RuntimeError: It found a bug; the message is its traceback.
        """
        link = self._connected()
        try:
            link.send((onnx_path, engine_path, options))
            kind, found = link.recv()
            while kind == "progress":
                progress(*found)
                kind, found = link.recv()
        except (EOFError, OSError) as error:
            raise self._death(onnx_path) from error
        if kind == "error":
            name = found.pop("error")
            raise getattr(errors, name)(**found)
        if kind == "system":
            raise OSError(*found)
        if kind == "bug":
            raise RuntimeError(found)

    def kill(self) -> None:
        """End the process, whatever it is at; ``build``, in another thread, then fails."""
        process = self._process
        if process is not None:
            # It may have been ended and closed just now.
            with suppress(ValueError):
                process.kill()

    def close(self) -> None:
        """End the process; nothing may be building."""
        self.kill()
        process, link = self._process, self._link
        self._process = self._link = None
        if link is not None:
            link.close()
        if process is not None:
            process.join()
            process.close()

    def _connected(self) -> Connection[Any, Any]:
        if self._link is None:
            from multiprocessing import get_context

            # spawn: a forked child would have the parent's logger and its threads' locks
            start = get_context("spawn")
            self._link, theirs = start.Pipe()
            self._process = start.Process(
                target=_live, args=(theirs, self._library_name), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._link

    def _death(self, onnx_path: Path) -> EngineBuildError:
        process = self._process
        if process is not None:
            process.join(timeout=10)
        code = process.exitcode if process is not None else None
        self.close()
        ended = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else "ended early"
        return EngineBuildError(
            f"{onnx_path}: the process that built its engine {ended}",
            expected="a graph that the builder takes, and memory for its weights several times",
            fix="Rerun with -vv, and with --jobs 1 if memory may be short",
        )


def _live(link: Connection[Any, Any], library_name: str) -> None:
    """Build what is asked for until the other end is closed, or its process has died."""
    # An interrupt from the keyboard is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker: LocalWorker | None = None
    # Whoever would be told of a broken link is gone.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            onnx_path, engine_path, options = link.recv()
            try:
                worker = worker or LocalWorker(library_name)
                worker.build(onnx_path, engine_path, options=options, progress=_Teller(link))
                answer: tuple[str, Any] = ("built", None)
            except MtlExportError as error:
                answer = ("error", error.as_dict())
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                answer = ("system", (error.errno, error.strerror, error.filename))
            except Exception:
                answer = ("bug", traceback.format_exc())
            link.send(answer)


class _Teller:
    """Sends a build's progress, not too often."""

    def __init__(self, link: Connection[Any, Any]) -> None:
        self._link, self._last = link, 0.0

    def __call__(self, phase: str, fraction: float) -> None:
        now = monotonic()
        if now - self._last >= REPORT_S:
            self._last = now
            self._link.send(("progress", (phase, fraction)))
