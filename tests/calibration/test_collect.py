from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import mtl_export_calibration.collect as module
from mtl_export.data.samples import Samples
from mtl_export.errors import CalibrationError
from mtl_export_calibration.collect import collect
from mtl_export_calibration.layers import QuantLayer, find_layers
from tests.calibration import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the toy's folder."""
    return toys.write_graph(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def layers(folder: Path) -> list[QuantLayer]:
    """Give the toy's two layers."""
    return find_layers(ir.load(folder / "model.onnx"))


def test_every_activation_is_counted(folder: Path, layers: list[QuantLayer]) -> None:
    """Histograms hold all values of all batches; kept rows are rows of the activation."""
    samples = toys.samples(50).of_task(1)
    found = collect(folder / "model.onnx", layers, samples, threads=1)
    weights = toys.values()
    e = weights["table"][samples.arrays["input_ids"]]
    m = np.maximum(e @ weights["first_weight_t"], 0).mean(axis=1)
    assert list(found) == ["e", "m"]
    assert found["e"].histogram.total == e.size
    assert found["e"].histogram.amax == np.abs(e).max()
    assert found["m"].histogram.amax == pytest.approx(np.abs(m).max(), rel=1e-5)
    rows = np.concatenate(found["e"].rows)
    assert 32 <= len(rows) <= 80
    flat = e.reshape(-1, toys.FEATURES)
    assert all((flat == row).all(axis=1).any() for row in rows)


def test_padding_is_not_counted(folder: Path, layers: list[QuantLayer]) -> None:
    """Rows of padding have no range: here they would be the loudest."""
    samples = toys.samples(20).of_task(0)
    ids, mask = samples.arrays["input_ids"].copy(), np.ones((20, toys.LENGTH), np.int64)
    ids[:, 4:], mask[:, 4:] = toys.TOKENS - 1, 0
    mask[0] = 1  # one long row keeps the others padded
    ids[0] = 0
    padded = Samples({"input_ids": ids, "attention_mask": mask}, samples.task_ids, samples.labels)
    found = collect(folder / "model.onnx", layers, padded, threads=1)
    assert found["e"].histogram.total == mask.sum() * toys.FEATURES
    assert found["e"].histogram.amax < 6


def test_groups_give_the_same(
    folder: Path, layers: list[QuantLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One activation at a time, where memory is short, changes no number."""
    samples = toys.samples(20).of_task(0)
    whole = collect(folder / "model.onnx", layers, samples, threads=1)
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "GROUP_BYTES", 1)
    split = collect(
        folder / "model.onnx", layers, samples, threads=1, progress=lambda *at: done.append(at)
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for name in whole:
        np.testing.assert_array_equal(whole[name].histogram.counts, split[name].histogram.counts)


def test_data_without_an_input_is_refused(folder: Path, layers: list[QuantLayer]) -> None:
    """The message names the array that the graph wants."""
    samples = toys.samples(2)
    short = Samples(
        {"attention_mask": samples.arrays["attention_mask"]}, samples.task_ids, samples.labels
    )
    with pytest.raises(CalibrationError, match="no array for the input input_ids"):
        collect(folder / "model.onnx", layers, short)


def test_wrong_shapes_are_refused(folder: Path, layers: list[QuantLayer]) -> None:
    """What onnxruntime says becomes ours."""
    samples = toys.samples(2)
    wrong = {**samples.arrays, "input_ids": samples.arrays["input_ids"] + 1000}
    with pytest.raises(CalibrationError, match="onnxruntime cannot run it on the data"):
        collect(folder / "model.onnx", layers, Samples(wrong, samples.task_ids, samples.labels))


def test_activations_must_be_finite(tmp_path: Path, layers: list[QuantLayer]) -> None:
    """NaN has no range."""
    folder = toys.write_graph(tmp_path / "nan", outlier=float("nan"))
    with pytest.raises(CalibrationError, match="NaN or Inf in e"):
        collect(folder / "model.onnx", layers, toys.samples(2))


def test_a_broken_graph_is_refused(tmp_path: Path, layers: list[QuantLayer]) -> None:
    """Weights that are gone are said to be."""
    model = ir.load(toys.write_graph(tmp_path) / "model.onnx")
    ir.save(model, tmp_path / "model.onnx", external_data="gone.data", size_threshold_bytes=0)
    (tmp_path / "gone.data").unlink()
    with pytest.raises(CalibrationError, match="onnxruntime cannot open it"):
        collect(tmp_path / "model.onnx", layers, toys.samples(2))
