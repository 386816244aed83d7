"""``mtl_export.parity``: the report and verdict of the command line, and nothing printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.parity import parity
from mtl_export.errors import UsageError
from tests.api.examples import run_example
from tests.cli.conftest import Run


def test_the_record_is_what_the_command_line_says(
    exported: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, floors and hashes too; the report may be written afterwards."""
    run_example(parity)
    found = mx.parity("adapter", base=Path("base"), onnx="out/onnx", quick=True, threads=1)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert (found.passed, found.exit_code, found.error) == (True, 0, None)
    document = run("parity", "--quick", "--threads", "1", "--json").json
    assert document == json.loads(json.dumps(found.as_dict()))
    found.write("reports/parity.json", Path("parity.md"))
    written = json.loads(Path("reports/parity.json").read_text())
    assert written == {key: document[key] for key in written}
    assert "passed" in Path("parity.md").read_text()


def test_a_difference_is_a_verdict(exported: Path, run: Run) -> None:
    """Nothing is within an error of nothing; a tolerance may be of all outputs or by output."""
    strict = mx.parity(
        "adapter", base="base", quick=True, atol=0, rtol={"logits": 0.0}, localise=False
    )
    assert (strict.passed, strict.exit_code, strict.report.parity_verdict) == (False, 3, "failed")
    words = ("--atol", "0", "--rtol", "logits:0", "--no-localise", "--json")
    assert run("parity", "--quick", *words).json == json.loads(json.dumps(strict.as_dict()))


def test_what_could_not_be_run_is_an_error_of_the_record(exported: Path) -> None:
    """It has the exit code of a missing backend, and is not raised."""
    (exported / "nothing").mkdir()
    found = mx.parity("adapter", base="base", engines="nothing", quick=True, require_run=True)
    assert found.exit_code == 6
    assert found.error is not None
    assert "nothing" in str(found.error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"onnx": "typo"}, "no such folder"),
        ({"quick": True, "full": True}, "both"),
        ({"atol": 1e-5}, "only one of them"),
        ({"max_drop": 0.5}, "without --dataset"),
        ({"score": "auc"}, "without --dataset"),
        ({"score": {"spam": "luck"}}, "one of accuracy"),
        ({"output": "elsewhere"}, "nothing under"),
    ],
)
def test_what_would_judge_nothing_is_refused(
    exported: Path, options: dict[str, object], said: str
) -> None:
    """A check that is shrunk by mistake must not pass."""
    with pytest.raises(UsageError, match=said):
        mx.parity("adapter", base="base", **options)  # type: ignore[arg-type]
