from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.api.evidence import cases_sha256
from mtl_export.api.settings import Settings
from mtl_export.errors import CheckpointError, OutputError, UsageError
from mtl_export.parity.cases import Case
from mtl_export.parity.reports.files import write_reports
from mtl_export_cli.config import read_config
from mtl_export_cli.reports import errors_reported
from tests.cli.conftest import Run, files_below
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


def test_a_write_that_fails_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves the old report, and nothing beside it."""
    path = tmp_path / "p.json"
    path.write_text("old")

    def fill_up(partial: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fill_up)
    with pytest.raises(OutputError, match="No space left"):
        write_reports([path], passing())
    assert files_below(tmp_path) == ["p.json"]


def test_an_unknown_suffix_is_refused_before_anything_is_compared(tmp_path: Path) -> None:
    """One wrong name among several stops all, and the others say so."""
    paths = [tmp_path / "a.json", tmp_path / "a.pdf"]
    with pytest.raises(UsageError, match="names no format"), errors_reported(paths):
        raise AssertionError
    assert files_below(tmp_path) == ["a.json"]
    assert "names no format" in paths[0].read_text()


def test_an_old_pass_does_not_outlive_an_interruption(tmp_path: Path) -> None:
    """From the start the report says that nothing has ended, so Ctrl-C and kill -9 leave that."""
    path = tmp_path / "p.json"
    write_reports([path], passing())
    with pytest.raises(KeyboardInterrupt), errors_reported([path]):
        raise KeyboardInterrupt
    document = json.loads(path.read_text())
    assert (document["verdict"], document["error"]["error"]) == ("not-run", "Unfinished")
    assert "interrupted" in document["error"]["problem"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter/adapter_config.json", "it lies in the checkpoint, adapter"),
        ("base/deep/new.json", "it lies in the base, base"),
        ("./link/config.json", "it lies in the base, base"),
        ("out/onnx/mtl-export.json", "which mtl-export wrote"),
        ("out/onnx/topic/p.html", "which mtl-export wrote"),
        ("folder.html", "it is a folder"),
    ],
)
@pytest.mark.parametrize("wrong", [[], ["-c", "nowhere"], ["--qick"]])
def test_no_report_takes_the_place_of_what_is_kept(
    exported: Path, run: Run, name: str, said: str, wrong: list[str]
) -> None:
    """Neither the result nor an error is written into a source or an export."""
    (exported / "folder.html").mkdir()
    (exported / "link").symlink_to("base")
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    outcome = run("parity", "--quick", "--report", name, *wrong)
    assert outcome.code == 2
    if not wrong:
        assert f"--report {Path(name)}: " in outcome.stderr
        assert said in outcome.stderr
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before


def test_reports_beside_sources_and_exports_are_written(exported: Path, run: Run) -> None:
    """Only what is inside is kept; a checkpoint that is a file keeps no folder to itself."""
    settings = Settings(checkpoint=exported / "adapter/adapter_model.safetensors", base="org/name")
    paths = [exported / "p.json", exported / "out" / "p.json"]
    with errors_reported(paths, settings):
        write_reports(paths, passing())
    assert all(json.loads(path.read_text())["verdict"] == "passed" for path in paths)


def test_what_ends_the_comparison_is_reported(tmp_path: Path) -> None:
    """Our errors with their parts, a bug by its name; both go on."""
    path = tmp_path / "p.json"
    with pytest.raises(CheckpointError), errors_reported([path]):
        raise CheckpointError("adapter: broken", fix="Mend it")
    document = json.loads(path.read_text())
    assert document["error"] == {
        "error": "CheckpointError", "problem": "adapter: broken", "expected": "",
        "fix": "Mend it",
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


@pytest.mark.parametrize(
    ("lines", "environment", "said"),
    [
        ("[parity]\natoll = 1\n", {}, "parity.atoll"),
        ("", {"MTL_EXPORT_THREADS": "x"}, "'x' is not a valid integer"),
    ],
)
def test_a_command_without_words_says_what_is_wrong_elsewhere(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch,
    lines: str, environment: dict[str, str], said: str,
) -> None:  # fmt: skip
    """A wrong key of the file or a wrong variable is a refusal, and no bug of ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtl-export.toml").write_text(f'base = "x"\ncheckpoint = "y"\n{lines}')
    outcome = run("parity", env=environment)
    assert outcome.code == 2
    assert said in outcome.stderr
