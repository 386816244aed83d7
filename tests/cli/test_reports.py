from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.errors import CheckpointError, OutputError, UsageError
from mtl_export.parity.cases import Case
from mtl_export_cli.config import read_config
from mtl_export_cli.reports import cases_sha256, check_suffixes, errors_reported, write_reports
from tests.parity.reports.samples import failing, passing


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"a.json"', ["a.json"]), ('["a.json", "b/c.html"]', ["a.json", "b/c.html"])],
)
def test_the_file_names_one_report_or_several(
    tmp_path: Path, value: str, expected: list[str]
) -> None:
    """Paths are relative to the file."""
    (tmp_path / "mtl-export.toml").write_text(f"[parity]\nreport = {value}\n")
    found = read_config(tmp_path / "mtl-export.toml").sections["parity"]["report"]
    assert found == [str(tmp_path / path) for path in expected]


@pytest.mark.parametrize("value", ["1", "[1]", '[""]', "true"])
def test_the_file_names_reports_by_text(tmp_path: Path, value: str) -> None:
    """Anything else is refused with the key."""
    (tmp_path / "mtl-export.toml").write_text(f"[parity]\nreport = {value}\n")
    with pytest.raises(UsageError, match=r"parity\.report"):
        read_config(tmp_path / "mtl-export.toml")


def test_reports_are_written_in_new_folders_and_replaced_whole(tmp_path: Path) -> None:
    """No part of an older report stays, nor a partial file."""
    paths = [tmp_path / "new" / f"p.{end}" for end in ("json", "md")]
    write_reports(paths, failing())
    write_reports(paths, passing())
    assert json.loads(paths[0].read_text())["verdict"] == "passed"
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["p.json", "p.md"]


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """The path and the system's reason."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"p\.json: it cannot be written"):
        write_reports([tmp_path / "file" / "p.json"], passing())


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """One wrong name among several stops all."""
    with pytest.raises(UsageError, match="names no format"):
        check_suffixes([tmp_path / "a.json", tmp_path / "a.pdf"])


def test_what_ends_the_comparison_is_reported(tmp_path: Path) -> None:
    """Our errors with their parts, a bug by its name; both go on."""
    path = tmp_path / "p.json"
    with pytest.raises(CheckpointError), errors_reported([path]):
        raise CheckpointError(where="adapter", found="broken", fix="Mend it")
    document = json.loads(path.read_text())
    assert document["error"] == {
        "error": "CheckpointError", "where": "adapter", "found": "broken", "expected": "",
        "why": "", "fix": "Mend it",
    }  # fmt: skip
    assert (document["verdict"], document["cells"]) == ("not-run", [])
    with pytest.raises(ZeroDivisionError), errors_reported([path]):
        _ = 1 / 0
    assert json.loads(path.read_text())["error"]["error"] == "ZeroDivisionError"


def test_the_hash_of_the_inputs_sees_every_change() -> None:
    """Value, dtype, shape, name and order of the batches."""
    case = Case("a", {"input_ids": np.arange(6).reshape(2, 3), "task_ids": np.array([0, 1])})
    hashes = {
        cases_sha256(cases)
        for cases in (
            [case],
            [case, case],
            [replace(case, name="b")],
            [replace(case, inputs={**case.inputs, "task_ids": np.array([1, 0])})],
            [replace(case, inputs={**case.inputs, "task_ids": np.array([0, 1], np.int32)})],
            [replace(case, inputs={**case.inputs, "input_ids": np.arange(6).reshape(3, 2)})],
            [replace(case, inputs={"tokens": np.arange(6), "task_ids": case.task_ids})],
        )
    }
    assert len(hashes) == 7
    assert cases_sha256([case]) == cases_sha256([replace(case)])
