"""``mtl_export.verify``: the record and verdict of the command line, and nothing printed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.verify import verify
from mtl_export.errors import IntegrityError, UsageError
from tests.api.examples import run_example
from tests.cli.conftest import Run


def test_the_record_is_what_the_command_line_says(
    exported: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good, damaged, and not run where it had to be; the folder may be text or a Path."""
    run_example(verify)
    good = mx.verify("out")
    strict = mx.verify(exported / "out", require_run=True, require_all_tasks=True)
    (exported / "out" / "onnx" / "spam" / "config.json").write_text("{}")
    damaged = mx.verify("out")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [good.exit_code, strict.exit_code, damaged.exit_code] == [0, 6, 7]
    assert [good.passed, strict.passed, damaged.passed] == [True, False, False]
    assert "no golden vectors" in strict.missing
    document = run("verify", "out", "--json").json
    checks = [json.loads(json.dumps(asdict(check))) for check in damaged.checks]
    assert document == {"ok": False, "exit_code": 7, "checks": checks} == damaged.as_dict()


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    """No folder, no manifest, and a digest that is none."""
    with pytest.raises(UsageError, match="no such folder"):
        mx.verify(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match=r"no mtl-export\.json"):
        mx.verify(tmp_path)
    with pytest.raises(UsageError, match="64 hex digits"):
        mx.verify(tmp_path, expect="12ab")
