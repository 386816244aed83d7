"""modelopt's ranges, by the package itself.

Opt-in: ``pytest -m other_env tests/calibration/test_modelopt.py``, in an environment with the
extra ``quant``; its newest versions want an older transformers than constraints.txt names.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CalibrationError
from mtl_export_calibration.calibrators import CALIBRATORS
from mtl_export_calibration.collect import TensorStatistics
from mtl_export_calibration.engines import engine_named
from mtl_export_calibration.formats import FP8, INT8, NumberFormat
from mtl_export_calibration.histogram import BINS
from mtl_export_calibration.layers import find_layers
from mtl_export_calibration.modelopt import MSE_STEP, ModeloptStatistics, load_modelopt
from tests.calibration import toys

pytestmark = [
    pytest.mark.other_env,
    pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"),
]


def batches(kind: str) -> list[Array]:
    """Return six batches of an activation."""
    generator = np.random.default_rng(3)
    found = []
    for place in range(6):
        values = generator.normal(size=(300, 64)) * (1 + place / 4)
        if kind == "relu":
            values = np.maximum(values, 0)
        elif kind == "outlier":
            values[:, 0] = 30.0
        found.append(values.astype(np.float32))
    return found


def both(
    values: Sequence[Array], method: str, number: NumberFormat
) -> tuple[ModeloptStatistics, float]:
    """Return modelopt's statistics of ``values``, and our own range."""
    theirs, ours = ModeloptStatistics(method, number), TensorStatistics()
    for batch in values:
        theirs.add(batch, 0)
        ours.add(batch, 0)
    return theirs, ours.compute_amax(method, number)


@pytest.mark.parametrize("number", [INT8, FP8], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
def test_ranges_are_like_ours(kind: str, number: NumberFormat) -> None:
    """max: the same; percentile: the other edge of the bin that completes it."""
    theirs, ours = both(batches(kind), "max", number)
    assert theirs.compute_amax("max", number) == ours
    theirs, ours = both(batches(kind), "percentile", number)
    # Our bins are up to twice as wide as 1/BINS of the largest value, theirs at most as wide.
    allowed = 3.0 / BINS * theirs.histogram.amax
    assert abs(theirs.compute_amax("percentile", number) - ours) <= allowed


@pytest.mark.parametrize("number", [INT8, FP8], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
def test_mse_is_as_small_as_ours(kind: str, number: NumberFormat) -> None:
    """Candidates lie further apart, and where few values are the error hardly changes."""
    values = batches(kind)
    theirs, ours = both(values, "mse", number)

    def error(amax: float) -> float:
        x = np.concatenate(values).astype(np.float64)
        return float(((x - number.rounded(x, number.scale(np.array(amax)))) ** 2).mean())

    found = theirs.compute_amax("mse", number)
    assert error(found) <= 1.02 * error(ours)
    assert abs(found - ours) <= 2 * MSE_STEP * theirs.histogram.amax


@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
def test_entropy_is_its_own(kind: str) -> None:
    """By another definition: it gives the first bin the count of the second, for instance.

    A rectified activation, half of whose values are 0, shows it: ours cuts values off to have
    small numbers precise, theirs does not.
    """
    values = batches(kind)
    theirs, ours = both(values, "entropy", INT8)
    alone = load_modelopt().HistogramCalibrator(8)
    for batch in values:
        alone.collect(torch.from_numpy(batch))
    growth = -(-theirs.histogram.amax // float(np.abs(values[0]).max()))
    found = theirs.compute_amax("entropy", INT8)
    assert found == float(alone.compute_amax("entropy", stride=8 * int(growth)))
    assert found <= theirs.histogram.amax * (1 + 8 / BINS)
    assert (found > 1.5 * ours) == (kind == "relu")


def test_the_unused_mse_is_still_wrong() -> None:
    """As soon as HistogramCalibrator's mse is right, it can take the place of the one used."""
    values = np.concatenate(batches("normal"))
    calib = load_modelopt()
    integers, floats = calib.HistogramCalibrator(8), calib.HistogramCalibrator((4, 3))
    integers.collect(torch.from_numpy(values))
    floats.collect(torch.from_numpy(values))
    statistics = TensorStatistics()
    statistics.add(values, 0)
    found = float(integers.compute_amax("mse", stride=8))
    assert found < 0.5 * CALIBRATORS["mse"](statistics.histogram, INT8)
    with pytest.raises(TypeError):
        floats.compute_amax("mse", stride=8)


@pytest.mark.parametrize("method", ["max", "percentile", "entropy", "mse"])
def test_zeros_have_no_range(method: str) -> None:
    """Zeros alone, as of features that are never active; zeros before other values count."""
    statistics = ModeloptStatistics(method, INT8)
    zeros = np.zeros((50, 8), np.float32)
    statistics.add(zeros, 0)
    assert statistics.compute_amax(method, INT8) == 0.0
    values = batches("normal")[:2]
    before, after = ModeloptStatistics(method, INT8), ModeloptStatistics(method, INT8)
    for batch in [zeros, *values]:
        before.add(batch, 0)
    for batch in [values[0], zeros, values[1]]:
        after.add(batch, 0)
    assert before.compute_amax(method, INT8) == after.compute_amax(method, INT8) > 0.0


def test_values_far_beyond_the_first_are_refused() -> None:
    """Its histogram would need millions of bins."""
    statistics = ModeloptStatistics("percentile", INT8)
    statistics.add(np.full((2, 2), 1e-4, np.float32), 0)
    with pytest.raises(CalibrationError, match="batch with values up to 1 after"):
        statistics.add(np.full((2, 2), 1.0, np.float32), 0)


@pytest.mark.parametrize("method", ["max", "percentile", "entropy", "mse"])
def test_a_graph_is_measured_as_ever(tmp_path: Path, method: str) -> None:
    """The same rows and histograms as ours, and its ranges beside them."""
    path = toys.write_graph(tmp_path) / "model.onnx"
    layers = find_layers(ir.load(path))
    rows = toys.samples(40).of_task(1)
    found: list[dict[str, Any]] = [
        engine_named(name, method, INT8)(path, layers, rows, threads=1)
        for name in ("onnxruntime", "modelopt")
    ]
    ours, theirs = found
    assert list(theirs) == ["e", "m"]
    for name, one in theirs.items():
        np.testing.assert_array_equal(one.histogram.counts, ours[name].histogram.counts)
        np.testing.assert_array_equal(np.concatenate(one.rows), np.concatenate(ours[name].rows))
        largest = one.histogram.amax
        assert largest / 16 <= one.compute_amax(method, INT8) <= largest * (1 + 8 / BINS)
    if method == "max":
        assert theirs["e"].compute_amax("max", INT8) == ours["e"].histogram.amax
