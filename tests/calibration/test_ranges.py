from __future__ import annotations

import numpy as np
import pytest

from mtl_export.errors import CalibrationError
from mtl_export.names import PER_TASK
from mtl_export_calibration.collect import TensorStatistics
from mtl_export_calibration.formats import INT8
from mtl_export_calibration.ranges import UNION, WEIGHTED, Cut, combine, cut_share, worst_cut


def statistics(**largest: float) -> dict[str, dict[str, TensorStatistics]]:
    """Return what one activation looks like on tasks: evenly spread up to their largest."""
    found = {}
    for task, value in largest.items():
        one = TensorStatistics()
        one.add(np.linspace(0, value, 1001, dtype=np.float32)[:, None], keep=0)
        found[task] = {"x": one}
    return found


def test_the_union_holds_every_task() -> None:
    """The widest range wins; the others pay by its ratio to their own."""
    ranges = combine(statistics(a=1.0, b=4.0), INT8, "max", UNION, {}, ["a", "b"])
    assert ranges.amax == {"x": 4.0}
    assert ranges.inflation("a") == {"x": 4.0}
    assert ranges.inflation("b") == {"x": 1.0}


def test_weights_mix_the_tasks() -> None:
    """A task of weight 0 takes no part, and is seen to be cut."""
    found = statistics(a=1.0, b=4.0)
    ranges = combine(found, INT8, "max", WEIGHTED, {"b": 0.0}, ["a", "b"])
    assert ranges.amax == {"x": 1.0}
    assert ranges.inflation("b") == {"x": 0.25}
    assert cut_share(found["b"]["x"].histogram, 1.0) == pytest.approx(0.75, abs=0.002)
    even = combine(found, INT8, "percentile", WEIGHTED, {}, ["a", "b"]).amax["x"]
    rare = combine(found, INT8, "percentile", WEIGHTED, {"b": 1e-4}, ["a", "b"]).amax["x"]
    assert rare < 1.5 < 3.9 < even


def test_all_weights_zero_are_refused() -> None:
    """There is nothing to take a range from."""
    with pytest.raises(CalibrationError, match="none above 0"):
        combine(statistics(a=1.0), INT8, "max", WEIGHTED, {"a": 0.0}, ["a"])


def test_a_merged_graph_has_its_own_ranges() -> None:
    """per-task takes one task's; a graph of several tasks cannot have that."""
    found = statistics(a=1.0, b=4.0)
    assert combine(found, INT8, "max", PER_TASK, {}, ["a"]).amax == {"x": 1.0}
    with pytest.raises(CalibrationError, match="serves 2 tasks"):
        combine(found, INT8, "max", PER_TASK, {}, ["a", "b"])


def test_nothing_is_cut_at_the_largest_value() -> None:
    """A range as wide as the values cuts none of them."""
    histogram = statistics(a=3.0)["a"]["x"].histogram
    assert cut_share(histogram, 3.0) == 0.0
    assert cut_share(histogram, 2.0) == pytest.approx(1 / 3, abs=0.002)


def test_values_beyond_a_range_tell_whose_rows_it_was_taken_from() -> None:
    """The activation that is cut most beyond what its calibrator would cut speaks for the task."""
    found = {
        name: statistics(a=largest)["a"]["x"] for name, largest in (("wide", 4.0), ("narrow", 1.0))
    }
    own = worst_cut(found, {"wide": 4.0, "narrow": 1.0}, "max", INT8)
    assert own.passes(3.0)
    cut = worst_cut(found, {"wide": 3.0, "narrow": 0.99}, "max", INT8)
    assert (cut.activation, cut.usual) == ("wide", 0.0)
    assert cut.share == pytest.approx(0.25, abs=0.002)
    assert not cut.passes(3.0)
    assert cut.passes(10_000.0)


def test_few_values_beyond_are_chance() -> None:
    """Three in a hundred say nothing, three in a hundred thousand times as many do."""
    assert Cut("x", 0.03, 0.0, 100).passes(3.0)
    assert not Cut("x", 0.03, 0.0, 1e7).passes(3.0)
    assert Cut("x", 0.03, 0.02, 1e7).passes(3.0)
    assert Cut().passes(0.0)
