"""``mtl_export.export_onnx``: the graphs of the command line, and nothing printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.onnx import export_onnx
from mtl_export.errors import UsageError
from tests.api.examples import run_example


def test_graphs_are_those_of_the_command_line(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, the single graph and those of tasks."""
    run_example(export_onnx)
    per_task = mx.export_onnx("adapter", base="base", output="own", tasks=["spam", "topic"])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [one.tasks for one in per_task] == [("topic",), ("spam",)]
    for own, shell in (
        (Path("graphs"), Path("out/onnx")),
        (Path("own/spam"), Path("out/onnx/spam")),
    ):
        for file in (own / "model.onnx", own / "mtl-export.json"):
            assert file.read_bytes() == (shell / file.name).read_bytes()


def test_what_would_be_ignored_is_refused(project: Path) -> None:
    """A task id in graphs of one task, and vectors of length 1 without vectors."""
    with pytest.raises(UsageError, match="--task-input scalar"):
        mx.export_onnx("adapter", base="base", output="x", tasks=["spam"], task_input="scalar")
    with pytest.raises(UsageError, match="--normalize"):
        mx.export_onnx("adapter", base="base", output="x", normalize=True)
    assert not (project / "x").exists()
