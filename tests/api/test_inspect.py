"""``mtl_export.inspect`` and ``plan``: what the command line says, as records."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.inspect import inspect
from mtl_export.api.plan import plan
from tests.api.examples import run_example
from tests.cli.conftest import Run


def test_the_report_is_the_command_lines(
    project: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the ledger too; a converted folder is an output."""
    run_example(inspect)
    found = mx.inspect("adapter", base="base", ledger=True)
    converted = mx.inspect("adapter", base=project / "base", convert_to="copy")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    document = run("inspect", "--base", "base", "--ledger", "--json").json
    assert {"ok": True, "command": "inspect", **found.report} == document
    assert [one.path.name for one in converted.outputs] == ["copy"]
    assert mx.inspect("copy").missing == (
        "base: Pass --base DIR_OR_HUB_ID, or set base in mtl-export.toml",
    )


@pytest.mark.usefixtures("project")
def test_the_plan_is_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all tasks or of those named."""
    run_example(plan)
    assert mx.plan("adapter", base="base", tasks=["spam"], dtype="fp16").tasks == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
