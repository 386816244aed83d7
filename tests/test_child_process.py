"""An object in another process: answers, reports, errors and deaths arrive here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from mtl_export.child_process import ChildProcess
from mtl_export.errors import EngineRunError, UsageError


class Counter:
    """Counts, fails and dies as it is told to."""

    def __init__(self, start: int) -> None:
        self._count = start

    def add(self, more: int, report: Callable[[str, int], None] | None = None) -> int:
        """Return the sum, reported as well."""
        self._count += more
        if report is not None:
            report("count", self._count)
        return self._count

    def fail(self, kind: str) -> None:
        """Raise an error of ours, of the system, or a bug; or end."""
        if kind == "ours":
            raise UsageError("x: no", expected="yes", fix="Do")
        if kind == "system":
            raise FileNotFoundError(2, "No such file", "x.onnx")
        if kind == "bug":
            raise KeyError(kind)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    """Give a process that counts from 1."""
    process = ChildProcess(EngineRunError, Counter, 1)
    yield process
    process.close()


def test_state_is_kept_and_reports_are_heard(child: ChildProcess) -> None:
    """One object answers all calls."""
    heard: list[tuple[str, int]] = []
    assert child.call("add", 2) == 3
    assert child.call("add", 4, hear=lambda *values: heard.append(values)) == 7
    assert heard == [("count", 7)]


def test_errors_arrive_as_themselves(child: ChildProcess) -> None:
    """With all their parts; a bug with its traceback. The object lives on."""
    with pytest.raises(UsageError) as ours:
        child.call("fail", "ours")
    assert ours.value.as_dict() == UsageError("x: no", expected="yes", fix="Do").as_dict()
    with pytest.raises(FileNotFoundError) as system:
        child.call("fail", "system")
    assert (system.value.errno, system.value.filename) == (2, "x.onnx")
    with pytest.raises(RuntimeError, match="KeyError: 'bug'"):
        child.call("fail", "bug")
    assert child.call("add", 1) == 2


def test_after_a_death_the_next_call_has_a_new_process(child: ChildProcess) -> None:
    """It says how the first one died, and begins anew."""
    assert child.call("add", 1) == 2
    with pytest.raises(EngineRunError, match="was ended by SIGKILL"):
        child.call("fail", "death")
    assert child.call("add", 1) == 2
