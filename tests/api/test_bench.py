"""``mtl_export.bench``: the record of the command line, and nothing printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.bench import bench
from mtl_export.errors import UsageError
from tests.api.examples import run_example
from tests.cli.conftest import Run


def test_the_record_is_what_the_command_line_says(
    exported: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same models, shapes and reasons; figures differ from run to run."""
    run_example(bench)
    found = mx.bench(
        exported / "adapter", base="base", shapes="1x8", rounds=1, eager=False, threads=1
    )
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    words = ("--shapes", "1x8", "--rounds", "1", "--no-eager", "--threads", "1")
    document = run("bench", *words, "--json").json
    record = found.as_dict()
    assert [*document] == ["ok", "command", *record]
    assert document["not_run"] == record["not_run"]
    assert [(one["artefact"], one["shape"]) for one in document["results"]] == [
        (timing.subject, str(timing.shape)) for timing in found.measured.timings
    ]
    assert found.ratio(found.measured.timings[0]) == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shapes": "8"}, "rows x tokens"),
        ({"rounds": 0}, "1 or more"),
        (
            {"new_tokens": 16, "shapes": "1x8", "eager": False},
            "nothing that was exported generates",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    exported: Path, options: dict[str, object], said: str
) -> None:
    """Also the default number of new tokens, where it was given and nothing generates."""
    with pytest.raises(UsageError, match=said):
        mx.bench("adapter", base="base", **options)  # type: ignore[arg-type]
