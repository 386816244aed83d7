"""What could not be run counts for --require-run; what a preset leaves out does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtl_export.api.artefacts import NOT_EXPORTED, Places
from mtl_export.api.coverage import refuse_not_run, unclaimed_cells
from mtl_export.parity.checks.quantised import PLAIN
from mtl_export.parity.report import Cell, ParityReport
from tests.factories import TASKS


@pytest.mark.parametrize(
    ("case", "reason", "counts"),
    [
        ("*", "onnxruntime: not installed", True),
        ("*", "an engine needs its GPU", True),
        (PLAIN, "the float graph it was made from is not there", True),
        ("*", f"{NOT_EXPORTED}; mtl-export trt makes it", False),
        ("1 row, task 0", "left out by --quick", False),
        ("zeroed adapters", "the checkpoint replaces tensors of the base", False),
    ],
)
def test_what_counts_as_not_run(case: str, reason: str, counts: bool) -> None:
    """Runtimes, devices and exports that are missing, and nothing else."""
    ran = Cell("per-task onnx", "onnxruntime", "spam", "mixed tasks", "passed")
    cell = Cell("per-task onnx", "onnxruntime", "topic", case, "not-run", reason)
    report = ParityReport((ran, cell), "", {}, {}, {})
    error = refuse_not_run(report, [])
    assert (error is not None and reason in str(error)) is counts
    assert refuse_not_run(ParityReport((ran,), "", {}, {}, {}), ["x has nothing"]) is not None


def test_every_place_is_looked_at_for_folders_of_no_task(tmp_path: Path) -> None:
    """Those with a manifest of ours; not what is shared, links, strangers or left half-written."""
    places = Places(tmp_path / "merged", tmp_path / "onnx", tmp_path / "engines", tmp_path)
    for kind in ("merged", "onnx", "engines", "onnx-int8", "engines-fp8"):
        for name in (TASKS[0].name, "old", ".spam.partial", "adapter-input"):
            (tmp_path / kind / name).mkdir(parents=True)
            (tmp_path / kind / name / "mtl-export.json").write_text("{}")
        (tmp_path / kind / "_shared" / "0a").mkdir(parents=True)
        (tmp_path / kind / "latest").symlink_to(tmp_path / kind / TASKS[0].name)
    cells = unclaimed_cells(places, TASKS)
    assert {cell.artefact for cell in cells} == {
        "merged pytorch", "per-task onnx", "per-task engine", "per-task int8",
        "per-task engine fp8",
    }  # fmt: skip
    assert {(cell.task, cell.verdict) for cell in cells} == {("old", "failed")}
    assert all(str(Path(kind.name) / "old") in "".join(cell.reason for cell in cells)
               for kind in tmp_path.iterdir())  # fmt: skip
    shutil.rmtree(tmp_path)
    assert not unclaimed_cells(places, TASKS)
