"""Edits of an exported graph, from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.tasks import add_task, remove_task, rename_task
from mtl_export.errors import TaskNotFoundError
from tests.api.examples import run_example


@pytest.mark.usefixtures("exported")
def test_edits_are_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A task comes, gets a name and goes; a repeated edit finds its result."""
    run_example(rename_task)
    assert mx.rename_task("out/onnx", "junk", "spam").after[2].name == "spam"
    run_example(add_task)
    removed = mx.remove_task(Path("out/onnx"), "spam_2")
    assert [task.name for task in removed.after] == ["ads_rel", "topic", "spam"]
    assert mx.remove_task("out/onnx", "spam_2").up_to_date
    run_example(remove_task)
    with pytest.raises(TaskNotFoundError):
        mx.remove_task("out/onnx", "nothing")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
