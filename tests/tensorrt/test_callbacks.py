"""What TensorRT calls back into: bytes, phases, and exceptions that must not be lost."""

from __future__ import annotations

import hashlib
import io

import pytest

from mtl_export.tensorrt.callbacks import FileSink, PhaseTracker


class FailingFile(io.BytesIO):
    """A file whose second write fails."""

    def write(self, data: object, /) -> int:
        """Write once."""
        if self.tell():
            raise OSError(28, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]


def test_sink_writes_and_hashes() -> None:
    """Size and hash are those of the file."""
    file = io.BytesIO()
    sink = FileSink(file)
    assert [sink.write(b"abc"), sink.write(b""), sink.write(b"de")] == [3, 0, 2]
    assert file.getvalue() == b"abcde"
    assert (sink.size_bytes, sink.sha256) == (5, hashlib.sha256(b"abcde").hexdigest())
    assert sink.problem is None


def test_sink_keeps_its_exception() -> None:
    """It is never raised into the bindings, and nothing is written after it."""
    file = FailingFile()
    sink = FileSink(file)
    assert [sink.write(b"abc"), sink.write(b"de"), sink.write(b"f")] == [3, 0, 0]
    assert isinstance(sink.problem, OSError)
    assert (file.getvalue(), sink.size_bytes) == (b"abc", 3)


def test_inner_phases_fill_their_parents_step() -> None:
    """Two steps of two: quarter by quarter, and finishing the outermost is 1."""
    seen: list[tuple[str, float]] = []
    tracker = PhaseTracker(lambda phase, fraction: seen.append((phase, fraction)))
    tracker.start("outer", None, 2)
    tracker.start("inner", "outer", 2)
    assert tracker.step("inner", 0)
    assert tracker.step("inner", 1)
    tracker.finish("inner")
    tracker.step("outer", 0)
    tracker.finish("outer")
    assert seen == [
        ("outer", 0.0),
        ("inner", 0.0),
        ("inner", 0.25),
        ("inner", 0.5),
        ("inner", 0.5),
        ("outer", 0.5),
        ("outer", 1.0),
    ]


def test_fraction_never_falls() -> None:
    """A phase that is entered twice in one step of its parent starts over, the figure does not."""
    seen: list[float] = []
    tracker = PhaseTracker(lambda phase, fraction: seen.append(fraction))
    tracker.start("outer", None, 2)
    for _ in range(2):
        tracker.start("inner", "outer", 2)
        tracker.step("inner", 0)
        tracker.finish("inner")
    assert seen == sorted(seen)


@pytest.mark.parametrize("parent", ["loop", "unknown"])
def test_odd_parents_do_no_harm(parent: str) -> None:
    """A phase inside itself, or inside one that was never started."""
    tracker = PhaseTracker(None)
    tracker.start("loop", parent, 0)
    assert tracker.step("loop", 5)
    assert tracker.step("never started", 0)
    tracker.finish("loop")
    assert tracker.problem is None


def test_exception_in_report_stops_the_build() -> None:
    """The first is kept, and the next step says stop."""
    calls: list[str] = []

    def report(phase: str, fraction: float) -> None:
        calls.append(phase)
        raise KeyboardInterrupt

    tracker = PhaseTracker(report)
    tracker.start("outer", None, 2)
    assert not tracker.step("outer", 0)
    assert isinstance(tracker.problem, KeyboardInterrupt)
    assert calls == ["outer"]
