"""Cells -> what the plots of the HTML report show: heat maps, error against floor, ECDF.

``plots.svg.j2`` draws them. Every mark carries the exact number in a title, which browsers
show on hovering.

Shares of the limit are drawn on a logarithmic scale from 0.001 to what is needed;
smaller ones, zero too, stand at its left end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mtl_export.parity.diagnosis.layer_errors import LayerError, Localisation
from mtl_export.parity.report import Cell, ParityReport, worst
from mtl_export.parity.reports import facts
from mtl_export.parity.tolerance import FLOOR_FACTOR

# From where to where an axis runs, in pixels.
LEFT, RIGHT = 190, 980
# Shares of the limit up to which a shade is used.
SHADES = (0.01, 0.03, 0.1, 0.3, 1.0)
HEAT_SHADES = [f"≤ {100 * most:g} %" for most in SHADES]
LAYER_SHADES = [f"≤ {most * FLOOR_FACTOR:.2g}x" for most in SHADES]
LEAST = 1e-3
# Characters of a name that are shown: the first of an artefact or task, the last of a layer.
LONGEST_NAME, LONGEST_LAYER = 26, 44


@dataclass(frozen=True)
class Square:
    """A square of a heat map: its place, the class of its colour, its mark, and what it says."""

    column: int
    row: int
    colour: str
    mark: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Squares under names of columns, beside names of rows that take ``left`` pixels."""

    name: str
    left: int
    columns: list[str]
    rows: list[str]
    squares: list[Square]


def heat_map(report: ParityReport, artefact: str) -> HeatMap | None:
    """Return tasks by cases of one artefact, shaded by the share of the limit used."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in report.cells:
        if cell.artefact == artefact and cell.case != facts.ALL:
            found.setdefault((cell.task, facts.case_kind(cell.case)), []).append(cell)
    if not found:
        return None
    kinds = [kind for kind in facts.case_kinds(report) if any(kind == k for _, k in found)]
    tasks = [*facts.tasks(report), facts.ALL]
    tasks = [task for task in tasks if any(task == t for t, _ in found)]
    squares = [
        _square(column, row, worst(found[task, kind]))
        for row, task in enumerate(tasks)
        for column, kind in enumerate(kinds)
        if (task, kind) in found
    ]
    labels = ["all tasks" if task == facts.ALL else cut(task) for task in tasks]
    return HeatMap(f"heat map of {artefact}", LEFT, kinds, labels, squares)


def layer_map(found: Localisation) -> HeatMap:
    """Return layers, in the order they run, by tasks, shaded by their error in noise floors."""
    layers = facts.names(one.layer for one in found.layers)
    tasks = facts.names(one.task for one in found.layers)
    squares = [
        _layer_square(tasks.index(one.task), layers.index(one.layer), one) for one in found.layers
    ]
    # What tells layers apart is at the end of their names.
    labels = [
        layer if len(layer) <= LONGEST_LAYER else f"…{layer[1 - LONGEST_LAYER :]}"
        for layer in layers
    ]
    name = f"errors by layer and task of {found.artefact}"
    return HeatMap(name, 300, tasks, labels, squares)


class Axis:
    """A logarithmic axis across the drawing, for ``values`` and at least one decade."""

    def __init__(self, values: Iterable[float], *, least: float) -> None:
        finite = [max(value, least) for value in values if math.isfinite(value)]
        self._low = math.floor(math.log10(min(finite)))
        self._high = max(math.ceil(math.log10(max(finite)) + 0.05), self._low + 1)

    def x(self, value: float) -> float:
        """Return where ``value`` stands; beyond the ends, at the end."""
        if not math.isfinite(value):
            return float(RIGHT)
        exponent = math.log10(value) if value > 0 else self._low
        part = (max(exponent, self._low) - self._low) / (self._high - self._low)
        return round(LEFT + min(part, 1.0) * (RIGHT - LEFT), 1)

    def decades(self) -> list[tuple[float, str]]:
        """Return where each decade stands, and its name where there is room for one."""
        exponents = range(self._low, self._high + 1)
        every = 1 + (len(exponents) - 1) // 12
        return [
            (self.x(10.0**exponent), "" if index % every else f"{10.0**exponent:g}")
            for index, exponent in enumerate(exponents)
        ]


@dataclass(frozen=True)
class FloorPlot:
    """Errors in multiples of their noise floor, by artefact, and the multiples that matter."""

    axis: Axis
    marks: list[tuple[float, str]]
    rows: dict[str, list[tuple[Cell, float]]]


def error_against_floor(report: ParityReport) -> FloorPlot | None:
    """Return every error in multiples of its noise floor; None where none was compared."""
    rows: dict[str, list[tuple[Cell, float]]] = {}
    limits = []
    for cell in report.cells:
        if cell.max_abs_error is not None and cell.noise_floor:
            ratio = cell.max_abs_error / cell.noise_floor
            rows.setdefault(cell.artefact, []).append((cell, ratio))
            limits += [cell.limit / cell.noise_floor] if cell.limit else []
    if not rows:
        return None
    marks = [(1.0, "the noise floor")]
    if limits and max(limits) <= 1.001 * min(limits):
        marks.append((limits[0], "allowed"))
    ratios = [ratio for row in rows.values() for _, ratio in row]
    return FloorPlot(Axis([*ratios, *(at for at, _ in marks)], least=1e-2), marks, rows)


@dataclass(frozen=True)
class Ecdf:
    """Shares of the limit that the cells of each artefact use, the smallest first."""

    axis: Axis
    shares: dict[str, list[float]]


def ecdf(report: ParityReport) -> Ecdf | None:
    """Return which share of the limit each cell uses; None where none was compared."""
    shares: dict[str, list[float]] = {}
    for cell in report.cells:
        used = facts.share(cell)
        if used is not None:
            shares.setdefault(cell.artefact, []).append(used)
    if not shares:
        return None
    every = [1.0, *(used for own in shares.values() for used in own)]
    return Ecdf(Axis(every, least=LEAST), {name: sorted(own) for name, own in shares.items()})


def cell_title(cell: Cell) -> str:
    """Return what a mark says of its cell, with the exact numbers."""
    text = f"{cell.artefact}, {cell.task}, {cell.case}: {cell.verdict}"
    if cell.max_abs_error is not None:
        text += f", error {facts.exact(cell.max_abs_error)}, allowed {facts.exact(cell.limit)}"
    return f"{text}. {cell.reason}" if cell.reason else text


def cut(name: str) -> str:
    """Return ``name`` as long as there is room for it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _square(column: int, row: int, cell: Cell) -> Square:
    used = facts.share(cell)
    if cell.verdict == "failed":
        colour, mark = "beyond", "cross"
    elif cell.verdict == "not-run":
        colour, mark = "absent", "dash"
    elif used is None:
        colour, mark = "absent", "tick"
    else:
        colour, mark = _shade(used), ""
    return Square(column, row, colour, mark, cell_title(cell))


def _layer_square(column: int, row: int, one: LayerError) -> Square:
    if one.verdict == "faulty":
        colour, mark = "beyond", "cross"
    elif one.verdict == "propagated":
        colour, mark = "carried", "dash"
    else:
        colour, mark = _shade(one.ratio / FLOOR_FACTOR), ""
    error = "not finite" if one.error is None else facts.exact(one.error)
    own = "not finite" if one.own_error is None else facts.exact(one.own_error)
    told = (
        f"{one.layer}, {one.task}: {one.verdict}, error {error}, floor {facts.exact(one.floor)};"
        f" its own {own}, floor {facts.exact(one.own_floor)}"
    )
    return Square(column, row, colour, mark, ". ".join(filter(None, (told, one.cause, one.detail))))


def _shade(share: float) -> str:
    # A relative tolerance can pass an error that is beyond the limit at the worst place.
    return next((f"s{i}" for i, most in enumerate(SHADES) if share <= most), "s4")
