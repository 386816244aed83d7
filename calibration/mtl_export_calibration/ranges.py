"""Each task's own ranges -> the ranges that a graph gets, and which task pays for them.

    union      the largest of the tasks' own: no task is cut more than its calibrator wants
    weighted   the calibrator's answer to all tasks mixed, each with its weight
    per-task   a merged graph's own task alone

A task pays where the range is wider than its own (``inflation`` > 1: coarser steps) or
narrower (< 1: values are cut off). Rows of other tasks that were fed under its name leave no
trace in its own range; the share of its values beyond it, on other rows, shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl_export.errors import CalibrationError
from mtl_export_calibration.calibrators import CALIBRATORS
from mtl_export_calibration.collect import TensorStatistics
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.histogram import Histogram

CUT_FACTOR = 3.0
# What the percentile calibrator cuts by definition; no calibrator is held to less.
USUAL_CUT = 1e-4
UNION, WEIGHTED, PER_TASK = COMBINATIONS = ("union", "weighted", "per-task")
# task -> activation -> statistics
Statistics = Mapping[str, Mapping[str, TensorStatistics]]


@dataclass(frozen=True)
class Ranges:
    """The ranges of one graph's activations.

    Attributes:
        amax: What the graph gets, by activation.
        own: What each task alone would get, by task, then by activation.
    """

    amax: Mapping[str, float]
    own: Mapping[str, Mapping[str, float]]

    def inflation(self, task: str) -> dict[str, float]:
        """Return how much wider each activation's range is than the task's own."""
        return {name: self.amax[name] / own for name, own in self.own[task].items() if own > 0.0}


@dataclass(frozen=True, slots=True)
class Cut:
    """The activation in which most of a task's values lie beyond the range.

    Attributes:
        activation: Its name; empty where ranges are not used.
        share: Of its values, on rows that no range was taken from.
        usual: What the calibrator would cut if it saw these rows.
        values: How many values there are.
    """

    activation: str = ""
    share: float = 0.0
    usual: float = 0.0
    values: float = 0.0

    def allowed(self, factor: float) -> float:
        """Return the largest share that is no sign of rows unlike those of calibration.

        Args:
            factor: Times as much as is usual.
        """
        if not self.values:
            return 1.0
        often = factor * max(self.usual, USUAL_CUT)
        # Of few values some lie beyond by chance: three standard deviations, and three values.
        return often + 3.0 * (math.sqrt(often / self.values) + 1.0 / self.values)

    def passes(self, factor: float) -> bool:
        """Return whether the task's values are cut no more often than allowed."""
        return self.share <= self.allowed(factor)


def worst_cut(
    statistics: Mapping[str, TensorStatistics],
    amax: Mapping[str, float],
    method: str,
    number: NumberFormat,
) -> Cut:
    """Return where ``amax`` cuts a task most, as a share of what is allowed.

    Args:
        statistics: Of the task's values, by activation, on rows that no range was taken from.
        amax: The graph's ranges.
        method: A key of ``CALIBRATORS``.
        number: The activations' format.
    """
    cuts = [Cut()]
    for name, one in statistics.items():
        histogram = one.histogram
        share = cut_share(histogram, amax[name])
        usual = cut_share(histogram, one.compute_amax(method, number)) if share else 0.0
        cuts.append(Cut(name, share, usual, histogram.total))
    return max(cuts, key=lambda cut: cut.share / cut.allowed(CUT_FACTOR))


def combine(
    statistics: Statistics,
    number: NumberFormat,
    method: str,
    how: str,
    weights: Mapping[str, float],
    tasks: Sequence[str],
) -> Ranges:
    """Return the ranges for a graph that serves ``tasks``.

    Args:
        statistics: Of every task that takes part.
        number: The activations' format.
        method: A key of ``CALIBRATORS``.
        how: One of ``COMBINATIONS``.
        weights: For ``weighted``: each task's weight; 1 where it has none.
        tasks: The tasks the graph serves; for ``per-task`` exactly one.

    Raises:
        CalibrationError: ``per-task`` for a graph of several tasks, or no weight above 0.
    """
    own = {
        task: {name: one.compute_amax(method, number) for name, one in by_name.items()}
        for task, by_name in statistics.items()
    }
    names = list(next(iter(own.values())))
    if how == PER_TASK:
        if len(tasks) != 1:
            raise CalibrationError(
                f"--combine per-task: a graph that serves {len(tasks)} tasks",
                expected="a merged graph, because a graph has one range for each activation",
                fix="Pass --combine union, or --layout per-task",
            )
        return Ranges(dict(own[tasks[0]]), {tasks[0]: own[tasks[0]]})
    if how == UNION:
        amax = {name: max(by_name[name] for by_name in own.values()) for name in names}
    else:
        calibrator = CALIBRATORS[method]
        amax = {name: calibrator(_mixed(statistics, name, weights), number) for name in names}
    return Ranges(amax, own)


def _mixed(statistics: Statistics, name: str, weights: Mapping[str, float]) -> Histogram:
    mixture = Histogram()
    for task, by_name in statistics.items():
        histogram = by_name[name].histogram
        if histogram.total:
            mixture.merge(histogram, weights.get(task, 1.0) / histogram.total)
    if not mixture.total:
        raise CalibrationError(
            "task weights: none above 0", expected="at least one", fix="Give a task a weight"
        )
    return mixture


def cut_share(histogram: Histogram, amax: float) -> float:
    """Return the share of values that lie beyond ``amax``."""
    if not histogram.total or histogram.amax <= amax:
        return 0.0
    first = math.ceil(amax / histogram.width - 1e-6)
    return float(histogram.counts[first:].sum() / histogram.total)
