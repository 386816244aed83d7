"""``mtl_export.merge``: the folders of the command line, and nothing printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.merge import merge
from mtl_export.errors import TaskNotFoundError, UsageError
from tests.api.examples import run_example
from tests.cli.conftest import Run, files_below


def test_folders_are_those_of_the_command_line(
    project: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, for all tasks and for those named; the second call finds them."""
    run_example(merge)
    found = mx.merge("adapter", base=project / "base", output="python", verify=True)
    again = mx.merge("adapter", base="base", output="python")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [one.status for one in found.outputs] == ["written"] * 3
    assert [one.status for one in again.outputs] == ["up to date"] * 3
    assert all(one.verified_count for one in found.tasks)
    assert run("merge", "--all-tasks", "-o", "shell").code == 0
    names = files_below(project / "shell")
    assert files_below(project / "python") == names
    for name in names:
        assert (project / "python" / name).read_bytes() == (project / "shell" / name).read_bytes()


def test_what_would_be_ignored_is_refused(project: Path) -> None:
    """A way to share without sharing, and a task that the checkpoint does not have."""
    with pytest.raises(UsageError, match="standalone folders share nothing"):
        mx.merge("adapter", base="base", output="x", shared_by="reference")
    with pytest.raises(TaskNotFoundError, match="spam"):
        mx.merge("adapter", base="base", output="x", tasks=["spamm"])
    with pytest.raises(TypeError, match="alfa"):
        mx.merge("adapter", base="base", output="x", alfa=2.0)  # type: ignore[call-arg]
    assert not (project / "x").exists()
