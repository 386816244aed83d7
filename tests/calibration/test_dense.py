"""Graphs of dense tasks, quantised on images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import mtl_export as mx
from mtl_export.errors import CalibrationError, UsageError
from mtl_export_calibration import calibrate
from tests.dense.checkpoints import DEPTHS, TASKS, checkpoint_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint, images, and its quantised graph of all tasks."""
    folder = tmp_path_factory.mktemp("dense")
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (12, 40, 40, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    np.savez(folder / "judge.npz", images=pixels, semseg=draw.integers(0, 5, (12, 64, 64)))
    found = calibrate(
        checkpoint_file(folder), data=folder / "images.npz", judge=folder / "judge.npz",
        layout="single-graph", max_drop=40, output_dir=folder / "out", samples=8,
    )  # fmt: skip
    assert found.passed
    return folder


def test_the_trunks_products_are_quantised_and_streams_are_not(folder: Path) -> None:
    """Four products a block and the patch mergings; not what knows tasks."""
    model = onnx.load(folder / "out" / "onnx-int8" / "model.onnx")
    stored = [one for one in model.graph.initializer if one.name.endswith(".weight_q")]
    shared = 3  # stages whose shared product of proj has a weight of its own
    assert len(stored) >= 4 * sum(DEPTHS) + len(DEPTHS) - 1 - shared
    assert {one.data_type for one in stored} == {onnx.TensorProto.INT8}
    own = [one for one in model.graph.initializer if ".task_" in one.name or ".shared_" in one.name]
    assert own
    assert {one.data_type for one in own} == {onnx.TensorProto.FLOAT}


def test_each_task_has_a_score_and_labels_count(folder: Path) -> None:
    """Of pixels where nobody labelled them."""
    report = mx.parity(
        folder / "ckpt_epoch_3.pth", output=folder / "out", quick=True
    ).report  # fmt: skip
    recorded = {one.task: one for one in report.quantised}
    assert recorded.keys() == set(TASKS)
    assert recorded["semseg"].labelled == 12
    assert recorded["sal"].labelled == 0
    assert 0 < recorded["sal"].sqnr_db["int8"] < 60


def test_parity_judges_what_calibrate_counted(folder: Path) -> None:
    """Within what was allowed it passes; with less allowed it fails."""
    file, out = folder / "ckpt_epoch_3.pth", folder / "out"
    result = mx.parity(file, output=out, quick=True)
    cells = [one for one in result.report.cells if one.artefact == "single-graph int8"]
    assert result.exit_code == 0
    assert {one.task for one in cells if one.case == "as calibrated"} == set(TASKS)
    assert {one.verdict for one in cells} == {"passed"}
    assert mx.parity(file, output=out, quick=True, max_drop=0).exit_code == 3
    assert mx.verify(out).exit_code == 0


def test_a_graph_that_loses_too_much_is_not_written(folder: Path) -> None:
    """Nothing is lost only where nothing is quantised."""
    found = calibrate(
        folder / "ckpt_epoch_3.pth", data=folder / "images.npz", layout="single-graph",
        max_drop=0, output=folder / "none", output_dir=folder / "out", samples=4,
    )  # fmt: skip
    assert found.exit_code == 4
    assert not (folder / "none").exists()


def test_data_that_are_no_images_are_refused(folder: Path, tmp_path: Path) -> None:
    """One message, with what to save."""
    np.savez(tmp_path / "rows.npz", input_ids=np.zeros((3, 4), np.int64))
    with pytest.raises(CalibrationError, match="neither image nor images"):
        calibrate(folder / "ckpt_epoch_3.pth", data=tmp_path / "rows.npz", output_dir=tmp_path)
    with pytest.raises(UsageError, match="--weight"):
        calibrate(
            folder / "ckpt_epoch_3.pth", data=folder / "images.npz", output_dir=tmp_path,
            deltas="exclude",
        )  # fmt: skip
