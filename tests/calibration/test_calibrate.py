"""``mtl_export_calibration.calibrate``: the record of the command line, and nothing printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_export.errors import UsageError
from mtl_export_calibration import calibrate
from tests.api.examples import run_example
from tests.cli.conftest import Run, exported, graphs, known_traces, originals, run, traced_once
from tests.factories import TASKS, WORDS

__all__ = ["exported", "graphs", "known_traces", "originals", "run", "traced_once"]


@pytest.fixture
def rows(exported: Path) -> Path:
    """Give the exported project with a few rows of every task."""
    words = [word for word in WORDS if word.isalpha()]
    lines = [{"task": task.name, "text": f"{word} night"} for task in TASKS for word in words[:6]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (exported / "rows.jsonl").write_text(text, encoding="utf-8")
    return exported


def test_the_record_is_what_the_command_line_says(
    rows: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line finds what was written, up to date, with the same report."""
    run_example(calibrate)
    found = calibrate(rows / "adapter", base="base", data="rows.jsonl", max_drop=100.0)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert (found.passed, found.exit_code) == (True, 0)
    document = run("calibrate", "--data", "rows.jsonl", "--max-drop", "100", "--json").json
    record = json.loads(json.dumps(found.as_dict()))
    for graph in (*document["graphs"], *record["graphs"]):
        del graph["output"]["seconds"]
    assert document == record


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "all"}, "one of single-graph, per-task, both"),
        ({"quantize": "int7"}, "one of int8, fp8, int4"),
        ({"weights": {"spam": 2.0}}, "nothing else weighs tasks"),
    ],
)
def test_a_value_that_means_nothing_is_refused(options: dict[str, object], said: str) -> None:
    """Before anything is opened."""
    with pytest.raises(UsageError, match=said):
        calibrate("adapter", base="base", data="rows.jsonl", **options)  # type: ignore[arg-type]


def test_without_rows_nothing_is_calibrated() -> None:
    """An empty name is no data, and an unknown keyword no option."""
    with pytest.raises(UsageError, match="no calibration data"):
        calibrate("adapter", base="base", data="")
    with pytest.raises(TypeError, match="'beta'"):
        calibrate("adapter", base="base", data="rows.jsonl", beta=1)  # type: ignore[call-arg]
