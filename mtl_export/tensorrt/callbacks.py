"""TensorRT's calls back into Python -> a file and a progress figure.

An exception that leaves a callback is printed by the bindings and lost, and the
build then reports success over an empty file. So each callback keeps its exception,
stops the build, and the builder raises it afterwards. Ctrl-C is kept likewise, for Python
would raise it in whatever callback is at work, the logger too: the monitor, which is
installed even if nobody wants the figures, then stops the build.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import BinaryIO, TypeAlias

from mtl_export.tensorrt.api import TrtObject

Progress: TypeAlias = Callable[[str, float], None]


class FileSink:
    """Where an engine's bytes go: a file, hashed on the way.

    Attributes:
        size_bytes: Bytes written so far.
        problem: The exception that stopped the writing, if one did.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size_bytes = 0
        self.problem: BaseException | None = None
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write ``data``; return how much was written, 0 after a problem."""
        if self.problem is not None:
            return 0
        try:
            self._file.write(data)
        except BaseException as problem:
            self.problem = problem
            return 0
        self._digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._digest.hexdigest()


class PhaseTracker:
    """TensorRT's nested phases -> one fraction that never falls.

    A phase has steps; a phase inside it fills its current step. The builder may call
    from several threads.

    Attributes:
        problem: The exception that ``report`` raised, if it did, or Ctrl-C.
    """

    def __init__(self, report: Progress | None) -> None:
        self.problem: BaseException | None = None
        self._report = report
        self._lock = threading.Lock()
        # name -> [parent, number of steps, steps done]
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._reached = 0.0

    def start(self, phase: str, parent: str | None, step_count: int) -> None:
        """Note that ``phase`` begins."""
        with self._lock:
            self._phases[phase] = (parent, max(step_count, 1), 0)
        self._tell(phase)

    def step(self, phase: str, step: int) -> bool:
        """Note that ``step`` of ``phase`` is done; return whether to go on."""
        with self._lock:
            if phase in self._phases:
                parent, step_count, _ = self._phases[phase]
                self._phases[phase] = (parent, step_count, min(step + 1, step_count))
        self._tell(phase)
        return self.problem is None

    def finish(self, phase: str) -> None:
        """Note that ``phase`` is over."""
        with self._lock:
            parent, _, _ = self._phases.pop(phase, (None, 1, 1))
            if parent is None:
                self._reached = 1.0
        self._tell(phase)

    def _tell(self, phase: str) -> None:
        if self.problem is not None:
            return
        try:
            with self._lock:
                self._reached = max(self._reached, self._fraction(phase))
                reached = self._reached
            if self._report is not None:
                self._report(phase, reached)
        except BaseException as problem:
            self.problem = problem

    def _fraction(self, phase: str) -> float:
        fraction, current = 0.0, phase
        # Bounded: a phase whose parent carries its own name would go round for ever.
        for _ in range(len(self._phases)):
            if current not in self._phases:
                return 0.0
            parent, step_count, done = self._phases[current]
            fraction = min((done + fraction) / step_count, 1.0)
            if parent is None:
                return fraction
            current = parent
        return 0.0


@contextmanager
def interrupts_kept(tracker: PhaseTracker) -> Iterator[None]:
    """Make Ctrl-C the tracker's problem while the block runs, and raise it at its end.

    A second Ctrl-C is Python's own again. Outside the main thread nothing changes: Python
    raises it there.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield
        return

    def keep(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        tracker.problem = KeyboardInterrupt()

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if isinstance(tracker.problem, KeyboardInterrupt):
            raise tracker.problem


def stream_writer(trt: ModuleType, sink: FileSink) -> TrtObject:
    """Return the writer that TensorRT streams an engine to."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def write(self, data: bytes) -> int:
            return sink.write(data)

    return Writer()


def progress_monitor(trt: ModuleType, tracker: PhaseTracker) -> TrtObject:
    """Return the monitor that TensorRT tells its phases to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def phase_start(self, phase: str, parent: str | None, step_count: int) -> None:
            tracker.start(phase, parent, step_count)

        def step_complete(self, phase: str, step: int) -> bool:
            return tracker.step(phase, step)

        def phase_finish(self, phase: str) -> None:
            tracker.finish(phase)

    return Monitor()
