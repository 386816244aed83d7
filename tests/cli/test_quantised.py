"""What calibrate wrote is found again by parity, judged as what it is, and its figures shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtl_export.adapters.binding import BoundModel
from mtl_export.api import sources
from mtl_export.api.artefacts import Places, find_artefacts
from mtl_export.api.parity_inputs import cases_of, oracle_of
from mtl_export.api.quantised import BY_CALIBRATE, with_max_drop
from mtl_export.api.settings import Settings
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.checks.quantised import PLAIN, QUANTISED
from mtl_export.parity.report import ParityReport
from mtl_export.parity.run import RunOptions, run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export_cli.main import cli
from mtl_export_cli.quantised import print_quantised
from tests.factories import TASKS, WORDS


@pytest.fixture(scope="module")
def calibrated_once(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project with quantised graphs of both layouts, made once and not changed."""
    folder = tmp_path_factory.mktemp("calibrated") / "project"
    shutil.copytree(graphs, folder)
    words = [word for word in WORDS if word.isalpha()]
    lines = [
        {"task": task.name, "text": f"{word} {words[(place + 3) % len(words)]} night", "label": 0}
        for task in TASKS
        for place, word in enumerate(words)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    config = ("--config", str(folder / "mtl-export.toml"), "--data", str(folder / "rows.jsonl"))
    loose = ("--max-drop", "100", "--threads", "1", "--method", "max")
    result = CliRunner().invoke(cli, ["calibrate", *config, *loose])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def calibrated(calibrated_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a copy of it, as the current folder."""
    shutil.copytree(calibrated_once, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def found(folder: Path) -> tuple[BoundModel, list[Artefact]]:
    """Return the model and the quantised artefacts of a project."""
    bound = sources.open_bound(Settings(checkpoint=folder / "adapter", base=str(folder / "base")))
    out = folder / "out"
    places = Places(out / "merged", out / "onnx", out / "engines", out)
    artefacts, _ = find_artefacts(bound, places, threads=1)
    return bound, [one for one in artefacts if one.quantised is not None]


def judged(bound: BoundModel, artefacts: list[Artefact]) -> ParityReport:
    """Return the report on artefacts."""
    return run_parity(
        bound, artefacts, cases_of(bound, None), tolerance=Tolerance(), oracle=oracle_of(bound),
        options=RunOptions(threads=1),
    )  # fmt: skip


def test_both_layouts_are_found_and_pass_as_what_they_are(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Q/DQ by the rule for float graphs; a line of figures for every task and graph."""
    bound, artefacts = found(calibrated)
    names = [(one.name, one.task.name if one.task else "*") for one in artefacts]
    merged = [("per-task int8", task.name) for task in TASKS]
    assert names == [*merged, ("single-graph int8", "*")]
    report = judged(bound, [artefacts[0], artefacts[-1]])
    failed = [cell for cell in report.cells if cell.verdict == "failed"]
    assert not failed  # the toy's random weights lose much here, and calibrate allowed all of it
    assert {(one.allowed, one.allowed_by) for one in report.quantised} == {(100.0, BY_CALIBRATE)}
    for case in (QUANTISED, PLAIN):
        own = {(cell.artefact, cell.task) for cell in report.cells if cell.case == case}
        assert {("per-task int8", TASKS[0].name)} < own
        assert {("single-graph int8", task.name) for task in TASKS} < own
    plain = [cell for cell in report.cells if cell.case == PLAIN]
    assert any(cell.max_abs_error and cell.limit and cell.limit < 1e-4 for cell in plain)
    assert len(report.quantised) == 1 + len(TASKS)
    for one in report.quantised:
        assert set(one.latency_ms) == {"fp32", "fp16", "int8"}
        assert list(one.sqnr_db) == ["fp16", "int8"]
        assert one.sqnr_db["fp16"] > one.sqnr_db["int8"]
    print_quantised(report)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("per-task int8", "single-graph int8")) for line in lines) == 4


def test_a_folder_that_is_no_longer_whole_fails(calibrated: Path) -> None:
    """A changed weight, a report of another graph, a graph that is gone."""
    root = calibrated / "out" / "onnx-int8"
    with (root / "model.onnx.data").open("ab") as file:
        file.write(b"more")
    (root / TASKS[0].name / "model.onnx").unlink()
    bound, artefacts = found(calibrated)
    broken = [artefacts[0], artefacts[-1]]
    assert all(one.defect for one in broken)
    cells = judged(bound, broken).cells
    assert [cell.verdict for cell in cells] == ["failed", "failed"]
    assert not artefacts[-1].quantised or not artefacts[-1].quantised.recorded


def test_a_report_of_another_graph_proves_nothing(calibrated: Path) -> None:
    """Without manifest and with another graph's report, nothing is taken from it."""
    root = calibrated / "out" / "onnx-int8"
    (root / "mtl-export.json").unlink()
    report = json.loads((root / "calibration.json").read_text())
    report["data"]["calibration_sha256"] = "0" * 64
    (root / "calibration.json").write_text(json.dumps(report))
    known = found(calibrated)[1][-1].quantised
    assert known is not None
    assert not known.recorded
    (root / "calibration.json").write_text('{"tasks": 3}')
    known = found(calibrated)[1][-1].quantised
    assert known is not None
    assert not known.recorded


def test_parity_s_own_max_drop_comes_first(calibrated: Path) -> None:
    """Whatever calibrate allowed when it wrote the graph."""
    for one in with_max_drop(found(calibrated)[1], 0.25):
        assert one.quantised is not None
        assert {task.allowed for task in one.quantised.recorded.values()} == {0.25}
        assert {task.allowed_by for task in one.quantised.recorded.values()} == {"by --max-drop"}


def test_a_folder_that_is_named_is_seen_for_what_it_holds(calibrated: Path) -> None:
    """--onnx out/onnx-int8: quantised, and its float graph is found beside."""
    bound, _ = found(calibrated)
    out = calibrated / "out"
    places = Places(out / "no merged", out / "onnx-int8", out / "engines")
    artefacts, _ = find_artefacts(bound, places, threads=1)
    assert [one.name for one in artefacts] == ["per-task onnx"] * len(TASKS) + ["single-graph onnx"]
    for one in artefacts:
        assert one.quantised is not None
        assert one.quantised.float_path is not None
        assert one.quantised.float_path.is_file()
