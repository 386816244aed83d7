"""How far each task moves each layer, and how much of that the output dtype keeps.

W the base's weight, D the task's exact change, R = rounded(W + D) - (W + D).

    drift         ||D|| / ||W||           how far the task moves the layer
    lost          ||R|| / ||D||           share of the change lost to rounding
    output_error  ||R|| / ||W + D||       expected relative error of the layer's output, for
                                          inputs without a preferred direction

Norms are Frobenius norms over evenly spaced blocks of rows, one in ``SAMPLE``; what a
block holds is random enough that the norms of the whole differ by a few percent.
``rows`` says how many were measured. A task's own figures are the root of the summed
squares over its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from mtl_export.checkpoint.tensors import Array

SAMPLE = 32
# Above this share of a task's change lost, the user is told.
LOSS_LIMIT = 0.10


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares over the measured rows.

    Attributes:
        rows: How many rows.
        base: Of W.
        change: Of D.
        merged: Of W + D.
        rounding: Of R.
    """

    rows: int = 0
    base: float = 0.0
    change: float = 0.0
    merged: float = 0.0
    rounding: float = 0.0

    def plus(self, other: Squares) -> Squares:
        """Return the sums over both."""
        return Squares(
            self.rows + other.rows,
            self.base + other.base,
            self.change + other.change,
            self.merged + other.merged,
            self.rounding + other.rounding,
        )

    @property
    def drift(self) -> float:
        """Return how far the task moves the layer."""
        return _ratio(self.change, self.base)

    @property
    def lost(self) -> float:
        """Return the share of the change that rounding loses."""
        return _ratio(self.rounding, self.change)

    @property
    def output_error(self) -> float:
        """Return the expected relative error of the layer's output."""
        return _ratio(self.rounding, self.merged)

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures as JSON's types, to six digits."""
        figures = {"drift": self.drift, "lost": self.lost, "output_error": self.output_error}
        return {name: float(f"{value:.6g}") for name, value in figures.items()}


@dataclass(frozen=True)
class TaskDrift:
    """One task's figures.

    Attributes:
        task: Its name.
        dtype: Of the folded weights, as written.
        layers: By module, in the base's order.
    """

    task: str
    dtype: str
    layers: Mapping[str, Squares]

    @property
    def total(self) -> Squares:
        """Return the sums over all layers."""
        return sum_of(self.layers.values())

    @property
    def loses_much(self) -> bool:
        """Return whether the dtype loses more of the change than ``LOSS_LIMIT``."""
        return self.total.lost > LOSS_LIMIT

    def as_dict(self) -> dict[str, object]:
        """Return the figures as JSON's types."""
        return {
            "task": self.task,
            "dtype": self.dtype,
            **self.total.as_dict(),
            "layers": {
                module: {"rows": squares.rows, **squares.as_dict()}
                for module, squares in self.layers.items()
            },
        }


def measure(base: Array, exact: Array, stored: Array, rows: int) -> Squares:
    """Return the sums over one block.

    Args:
        base: W, flat float64.
        exact: W + D, likewise.
        stored: The same rounded, in any dtype.
        rows: How many rows they are.
    """
    change = exact - base
    rounding = stored.astype(np.float64) - exact
    return Squares(
        rows,
        float(base @ base),
        float(change @ change),
        float(exact @ exact),
        float(rounding @ rounding),
    )


def sum_of(squares: Iterable[Squares]) -> Squares:
    """Return the sums over all of ``squares``."""
    total = Squares()
    for one in squares:
        total = total.plus(one)
    return total


def _ratio(numerator: float, denominator: float) -> float:
    return sqrt(numerator / denominator) if denominator else 0.0
