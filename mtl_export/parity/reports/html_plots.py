"""Cells -> SVG, without a plotting library: heat map, error against floor, ECDF.

Every plot is a function from the report to one ``<svg>`` whose marks carry the exact
number in a ``<title>``, which browsers show on hovering. Colours are classes of
``html_style``, so one drawing serves light and dark.

Shares of the limit are drawn on a logarithmic scale from 0.001 to what is needed;
smaller ones, zero too, stand at its left end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mtl_export.parity.diagnosis.layer_errors import LayerError, Localisation
from mtl_export.parity.report import Cell, ParityReport, worst
from mtl_export.parity.reports import facts
from mtl_export.parity.reports.facts import escaped
from mtl_export.parity.tolerance import FLOOR_FACTOR

WIDTH = 1000
# Share of the limit up to which a shade is used, and how the legend names it.
SHADES = ((0.01, "≤ 1 %"), (0.03, "≤ 3 %"), (0.1, "≤ 10 %"), (0.3, "≤ 30 %"), (1.0, "≤ 100 %"))
LEAST = 1e-3
SERIES = 6
# Characters of a layer's name that are shown, the last ones.
LONGEST_LAYER = 44
_CELL, _GAP, _LEFT = 22, 3, 190


def heat_map(report: ParityReport, artefact: str) -> str:
    """Return tasks by cases of one artefact, shaded by the share of the limit used."""
    cells = [cell for cell in report.cells if cell.artefact == artefact and cell.case != facts.ALL]
    if not cells:
        return ""
    squares: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        squares.setdefault((cell.task, facts.case_kind(cell.case)), []).append(cell)
    present, there = {task for task, _ in squares}, {kind for _, kind in squares}
    kinds = [kind for kind in facts.case_kinds(report) if kind in there]
    rows = [task for task in facts.tasks(report) if task in present]
    rows += [facts.ALL] * (facts.ALL in present)
    step = _CELL + _GAP
    head = 12 + round(0.62 * max(_length(kind) for kind in kinds))
    parts = []
    for column, kind in enumerate(kinds):
        x, y = _LEFT + column * step + _CELL // 2, head - 6
        parts.append(
            f'<text x="{x}" y="{y}" transform="rotate(-38 {x} {y})">{escaped(kind)}</text>'
        )
    for row, task in enumerate(rows):
        y = head + row * step
        label = "all tasks" if task == facts.ALL else task
        parts.append(_text(_LEFT - 8, y + 15, _cut(label, 26), "end"))
        for column, kind in enumerate(kinds):
            if own := squares.get((task, kind)):
                parts.append(_square(_LEFT + column * step, y, worst(own)))
    # The last label leans out to the right by what its length gives.
    width = _LEFT + len(kinds) * step + round(0.79 * _length(kinds[-1])) + 16
    return _svg(max(width, 420), head + len(rows) * step + 4, parts, f"heat map of {artefact}")


def layer_map(found: Localisation) -> str:
    """Return layers, in the order they run, by tasks, shaded by their error in noise floors."""
    if not found.layers:
        return ""
    layers = facts.names(one.layer for one in found.layers)
    tasks = facts.names(one.task for one in found.layers)
    step, left = _CELL + _GAP, 300
    head = 24 + round(0.62 * max(_length(task) for task in tasks))
    parts = []
    for column, task in enumerate(tasks):
        x, y = left + column * step + _CELL // 2, head - 6
        parts.append(
            f'<text x="{x}" y="{y}" transform="rotate(-38 {x} {y})">{escaped(task)}</text>'
        )
    for row, layer in enumerate(layers):
        # What tells layers apart is at the end of their names.
        shown = layer if len(layer) <= LONGEST_LAYER else f"…{layer[1 - LONGEST_LAYER :]}"
        parts.append(_text(left - 8, head + row * step + 15, shown, "end"))
    for one in found.layers:
        place = (left + tasks.index(one.task) * step, head + layers.index(one.layer) * step)
        parts.append(_layer_square(*place, one))
    width = left + len(tasks) * step + round(0.79 * _length(tasks[-1])) + 16
    name = f"errors by layer and task of {found.artefact}"
    return _svg(max(width, 420), head + len(layers) * step + 4, parts, name)


def layer_legend() -> str:
    """Return what the shades of the layer maps mean."""
    parts: list[str] = []
    x = 0
    for index, (most, _) in enumerate(SHADES):
        parts.append(f'<rect class="s{index}" x="{x}" y="2" width="16" height="16" rx="3"/>')
        parts.append(_text(x + 22, 15, f"≤ {most * FLOOR_FACTOR:.2g}x"))
        x += 84
    for style, name, mark in (
        ("beyond", "wrong itself", _cross),
        ("carried", "given wrong", _dash),
    ):
        parts.append(f'<rect class="{style}" x="{x}" y="2" width="16" height="16" rx="3"/>')
        parts += [mark(x, 2, 16), _text(x + 22, 15, name)]
        x += 50 + round(_length(name))
    return _svg(WIDTH, 22, parts, "legend: error of a layer in noise floors")


def heat_legend() -> str:
    """Return what the shades of the heat maps mean."""
    parts: list[str] = []
    x = 0
    for index, (_, name) in enumerate(SHADES):
        parts.append(f'<rect class="s{index}" x="{x}" y="2" width="16" height="16" rx="3"/>')
        parts.append(_text(x + 22, 15, name))
        x += 84
    marks = (("beyond", "failed", _cross), ("absent", "passed, no number", _tick),
             ("absent", "not run", _dash))  # fmt: skip
    for style, name, mark in marks:
        parts.append(f'<rect class="{style}" x="{x}" y="2" width="16" height="16" rx="3"/>')
        parts += [mark(x, 2, 16), _text(x + 22, 15, name)]
        x += 50 + round(_length(name))
    return _svg(WIDTH, 22, parts, "legend: error as a share of what was allowed")


def error_against_floor(report: ParityReport) -> str:
    """Return every error in multiples of its noise floor, a row per artefact."""
    points = [
        (cell, cell.max_abs_error / cell.noise_floor)
        for cell in report.cells
        if cell.max_abs_error is not None and cell.noise_floor
    ]
    if not points:
        return ""
    rows = facts.names(cell.artefact for cell, _ in points)
    limits = [c.limit / c.noise_floor for c, _ in points if c.limit and c.noise_floor]
    same = limits and max(limits) <= 1.001 * min(limits)
    marks = [(1.0, "the noise floor")] + ([(limits[0], "allowed")] if same else [])
    axis = _Axis([ratio for _, ratio in points] + [at for at, _ in marks], least=1e-2)
    height = 40 + 30 * len(rows)
    parts = axis.draw(26, height - 4, "x")
    for at, name in marks:
        x = axis.x(at)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{height - 4}"/>')
        parts.append(_text(x, 14, f"{name} ({at:g}x)", "middle quiet"))
    for row, artefact in enumerate(rows):
        y = 45 + 30 * row
        parts.append(_text(_LEFT - 8, y + 4, _cut(artefact, 26), "end"))
        own = [(cell, ratio) for cell, ratio in points if cell.artefact == artefact]
        for index, (cell, ratio) in enumerate(own):
            # Spread by a fixed pattern, so that equal errors do not hide one another.
            shift = (index * 7 % 13 - 6) * 1.2
            style = "dot out" if cell.verdict == "failed" else "dot"
            parts.append(
                f'<circle class="{style}" cx="{axis.x(ratio):.1f}" cy="{y + shift:.1f}" r="4">'
                f"<title>{escaped(_told(cell))}</title></circle>"
            )
    return _svg(WIDTH, height + 22, parts, "errors in multiples of the noise floor")


def ecdf(report: ParityReport) -> str:
    """Return which part of an artefact's cells uses at most a given share of the limit."""
    shares: dict[str, list[float]] = {}
    for cell in report.cells:
        used = facts.share(cell)
        if used is not None:
            shares.setdefault(cell.artefact, []).append(used)
    if not shares:
        return ""
    axis = _Axis([*(used for own in shares.values() for used in own), 1.0], least=LEAST)
    top, bottom = 16, 236
    parts = axis.draw(top, bottom, "")
    for percent in (0, 25, 50, 75, 100):
        y = bottom - (bottom - top) * percent / 100
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - 20}" y1="{y}" y2="{y}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{percent} %", "end quiet"))
    x = axis.x(1.0)
    parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
    for index, (artefact, own) in enumerate(shares.items()):
        path = _steps(sorted(own), axis, top, bottom)
        color = f"c{index % SERIES}"
        parts.append(
            f'<path class="step {color}" d="{path}"><title>{escaped(artefact)}</title></path>'
        )
        y = bottom + 44 + 18 * index
        parts.append(f'<path class="step {color}" d="M{_LEFT} {y - 4}h26"/>')
        parts.append(_text(_LEFT + 34, y, f"{artefact}: {len(own)} cells, largest {max(own):.3g}"))
    height = bottom + 44 + 18 * len(shares)
    return _svg(WIDTH, height, parts, "share of cells by share of the limit used")


class _Axis:
    """A logarithmic axis across the drawing, for ``values`` and at least one decade."""

    def __init__(self, values: Iterable[float], *, least: float) -> None:
        finite = [max(value, least) for value in values if math.isfinite(value)]
        self._low = math.floor(math.log10(min(finite)))
        self._high = max(math.ceil(math.log10(max(finite)) + 0.05), self._low + 1)

    def x(self, value: float) -> float:
        """Return where ``value`` stands; beyond the ends, at the end."""
        if not math.isfinite(value):
            return float(WIDTH - 20)
        exponent = math.log10(value) if value > 0 else self._low
        part = (max(exponent, self._low) - self._low) / (self._high - self._low)
        return _LEFT + min(part, 1.0) * (WIDTH - 20 - _LEFT)

    def draw(self, top: float, bottom: float, unit: str) -> list[str]:
        """Return lines and names of the decades."""
        decades = range(self._low, self._high + 1)
        every = 1 + (len(decades) - 1) // 12
        parts = []
        for exponent in decades:
            x = self.x(10.0**exponent)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
            if (exponent - self._low) % every == 0:
                parts.append(_text(x, bottom + 17, f"{10.0**exponent:g}{unit}", "middle quiet"))
        return parts


def _steps(ordered: Sequence[float], axis: _Axis, top: float, bottom: float) -> str:
    path = [f"M{_LEFT} {bottom}"]
    for index, used in enumerate(ordered, start=1):
        path.append(f"H{axis.x(used):.1f}V{bottom - (bottom - top) * index / len(ordered):.1f}")
    return "".join([*path, f"H{WIDTH - 20}"])


def _square(x: int, y: int, cell: Cell) -> str:
    used = facts.share(cell)
    mark = ""
    if cell.verdict == "failed":
        style, mark = "beyond", _cross(x, y, _CELL)
    elif cell.verdict == "not-run":
        style, mark = "absent", _dash(x, y, _CELL)
    elif used is None:
        style, mark = "absent", _tick(x, y, _CELL)
    else:
        fitting = [index for index, (most, _) in enumerate(SHADES) if used <= most]
        # A relative tolerance can pass an error that is beyond the limit at the worst place.
        style = f"s{fitting[0] if fitting else len(SHADES) - 1}"
    box = f'<rect class="{style}" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="3"/>'
    return f"<g><title>{escaped(_told(cell))}</title>{box}{mark}</g>"


def _layer_square(x: int, y: int, one: LayerError) -> str:
    mark = ""
    if one.verdict == "faulty":
        style, mark = "beyond", _cross(x, y, _CELL)
    elif one.verdict == "propagated":
        style, mark = "carried", _dash(x, y, _CELL)
    else:
        fitting = [i for i, (most, _) in enumerate(SHADES) if one.ratio <= most * FLOOR_FACTOR]
        style = f"s{fitting[0] if fitting else len(SHADES) - 1}"
    error = "not finite" if one.error is None else facts.exact(one.error)
    own = "not finite" if one.own_error is None else facts.exact(one.own_error)
    told = (
        f"{one.layer}, {one.task}: {one.verdict}, error {error}, floor {facts.exact(one.floor)};"
        f" its own {own}, floor {facts.exact(one.own_floor)}"
    )
    more = [text for text in (one.cause, one.detail) if text]
    title = escaped(". ".join([told, *more]))
    box = f'<rect class="{style}" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="3"/>'
    return f"<g><title>{title}</title>{box}{mark}</g>"


def _cross(x: int, y: int, size: int) -> str:
    a, b = size * 0.3, size * 0.7
    falling = f"M{x + a:.1f} {y + a:.1f}L{x + b:.1f} {y + b:.1f}"
    rising = f"M{x + b:.1f} {y + a:.1f}L{x + a:.1f} {y + b:.1f}"
    return f'<path class="cross" d="{falling}{rising}"/>'


def _tick(x: int, y: int, size: int) -> str:
    start = f"M{x + size * 0.27:.1f} {y + size * 0.52:.1f}"
    down, up = (f"l{size * a:.1f} {size * b:.1f}" for a, b in ((0.17, 0.18), (0.3, -0.38)))
    return f'<path class="tick" d="{start}{down}{up}"/>'


def _dash(x: int, y: int, size: int) -> str:
    return f'<path class="dash" d="M{x + size * 0.3:.1f} {y + size / 2:.1f}h{size * 0.4:.1f}"/>'


def _told(cell: Cell) -> str:
    text = f"{cell.artefact}, {cell.task}, {cell.case}: {cell.verdict}"
    if cell.max_abs_error is not None:
        text += f", error {facts.exact(cell.max_abs_error)}, allowed {facts.exact(cell.limit)}"
    return f"{text}. {cell.reason}" if cell.reason else text


def _text(x: float, y: float, text: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{escaped(text)}</text>'


def _length(text: str) -> float:
    """Return about how long 12-pixel text is."""
    return 6.6 * len(text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(width: float, height: float, parts: Sequence[str], name: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        f' role="img" aria-label="{escaped(name)}">{"".join(parts)}</svg>'
    )
