"""What every format says of a report in the same words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from mtl_export.parity.report import (
    AccuracyCell,
    Cell,
    ParityReport,
    Verdict,
    worst,
    worst_by_artefact,
)

ALL = "*"
VERDICTS: tuple[Verdict, ...] = ("passed", "failed", "not-run")
# https://www.w3.org/TR/xml/#charsets: what XML 1.0 cannot hold, not even escaped
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ONE_TASK = re.compile(r"\btask \d+\b")


def verdict_line(report: ParityReport) -> str:
    """Return the verdict and the counts, on one line."""
    if report.error:
        return f"parity could not be judged: {error_text(report)}"
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in VERDICTS)
    line = f"parity {report.parity_verdict}: {counts}"
    if not report.accuracy:
        return line
    line += f"; accuracy {report.accuracy_verdict}"
    cell = max(worst_by_artefact(report.accuracy).values(), key=_dropped)
    change = "" if cell.drop is None else f": {cell.task} {points(-cell.drop)} points at worst"
    return line + change


def _dropped(cell: AccuracyCell) -> float:
    return -math.inf if cell.drop is None else cell.drop


def points(share: float | None) -> str:
    """Return a change of a score in points, with its sign."""
    return "" if share is None else f"{100 * share + 0.0:+.2f}"


def score(value: float | None) -> str:
    """Return a score for people."""
    return "" if value is None else f"{value:.4f}"


def interval(cell: AccuracyCell) -> str:
    """Return the interval of a drop as a change, in points."""
    if cell.low is None or cell.high is None:
        return ""
    return f"{points(-cell.high)} to {points(-cell.low)}"


ACCURACY_COLUMNS = (
    "artefact", "task", "score", "rows", "reference", "artefact's", "change", "95 % interval",
    "allowed", "verdict",
)  # fmt: skip


def accuracy_row(cell: AccuracyCell) -> list[str]:
    """Return what is told of a score, changes in points, a text for each column."""
    return [
        cell.artefact, cell.task, cell.score, str(cell.rows), score(cell.reference),
        score(cell.candidate), points(None if cell.drop is None else -cell.drop),
        interval(cell), points(-cell.allowed), cell.verdict,
    ]  # fmt: skip


def least_tolerance_line(report: ParityReport) -> str:
    """Return what every error would have passed under, on one line; empty if none was compared."""
    told = [
        f"{output} {atol:.3g} ({factor:.2g} x noise floor)"
        for output, (atol, factor) in report.least_tolerances.items()
    ]
    return f"least atol that passes: {', '.join(told)}" if told else ""


def error_text(report: ParityReport) -> str:
    """Return what kept the comparison from being made, as one paragraph; "" if nothing did."""
    parts = report.error
    if not parts:
        return ""
    text = f"{parts.get('problem', '')}."
    if parts.get("expected"):
        text += f" Expected {parts['expected']}."
    return text + (f" {parts['fix']}." if parts.get("fix") else "")


def failures(report: ParityReport) -> list[Cell]:
    """Return the failed cells, the largest share of their limit first."""
    found = [cell for cell in report.cells if cell.verdict == "failed"]
    return sorted(found, key=lambda cell: -_severity(cell))


def _severity(cell: Cell) -> float:
    used = share(cell)
    return math.inf if used is None else used


def share(cell: Cell) -> float | None:
    """Return the error as a share of what was allowed; None where nothing was compared."""
    if cell.max_abs_error is None or cell.limit is None:
        return None
    if cell.limit == 0:
        return 0.0 if cell.max_abs_error == 0 else math.inf
    return cell.max_abs_error / cell.limit


def clean(text: str) -> str:
    """Return ``text`` without the characters that XML and HTML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def number(value: float | None) -> str:
    """Return an error for people."""
    return "" if value is None else f"{value:.1e}"


def measured(cell: Cell) -> str:
    """Return the largest error for people; of a quantised artefact, its signal to noise."""
    return number(cell.max_abs_error) if cell.sqnr_db is None else f"{cell.sqnr_db:.1f} dB"


def exact(value: float | None) -> str:
    """Return a number as JSON writes it."""
    return "" if value is None else repr(float(value))


def not_run(report: ParityReport) -> list[tuple[str, str, str]]:
    """Return artefact, tasks and reason of what did not run, one for each reason."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in report.cells:
        if cell.verdict == "not-run":
            groups.setdefault((cell.artefact, cell.reason), []).append(cell)
    return [
        (artefact, _tasks(cells), reason + _cases(cells))
        for (artefact, reason), cells in groups.items()
    ]


def _tasks(cells: list[Cell]) -> str:
    found = names(cell.task for cell in cells)
    return "all tasks" if ALL in found else ", ".join(found)


def _cases(cells: list[Cell]) -> str:
    """Return the cases that did not run, where it is not the artefact as a whole."""
    found = [case for case in names(cell.case for cell in cells) if case != ALL]
    return f" ({', '.join(found)})" if found else ""


def names(values: Iterable[str]) -> list[str]:
    """Return each of ``values`` once, in order."""
    return list(dict.fromkeys(values))


def artefacts(report: ParityReport) -> list[str]:
    """Return the names of the artefacts that were judged or looked for, in order."""
    return names([*(cell.artefact for cell in report.cells), *_scored(report)])


def _scored(report: ParityReport) -> list[str]:
    return [cell.artefact for cell in report.accuracy]


def tasks(report: ParityReport) -> list[str]:
    """Return the names of the tasks, in order; what holds for all of them is not one."""
    floors = next(iter(report.noise_floors.values()), {})
    return names([*floors, *(cell.task for cell in report.cells if cell.task != ALL)])


def matrix(report: ParityReport) -> dict[str, dict[str, Cell]]:
    """Return, by task and then by artefact, the cell that speaks for both, where there is one.

    What holds for all tasks counts for each.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in report.cells:
        found.setdefault((cell.artefact, cell.task), []).append(cell)
    rows: dict[str, dict[str, Cell]] = {task: {} for task in tasks(report)}
    for artefact in artefacts(report):
        shared = found.get((artefact, ALL), [])
        for task, row in rows.items():
            own = found.get((artefact, task), []) + shared
            if own:
                row[artefact] = worst(own)
    return rows


def case_kind(case: str) -> str:
    """Return the case with its task left out: those of all tasks share a column."""
    return _ONE_TASK.sub("one task", case)


def case_kinds(report: ParityReport) -> list[str]:
    """Return all kinds of case, in the order of the artefact that was run on the most."""
    by_artefact: dict[str, list[str]] = {}
    for cell in report.cells:
        by_artefact.setdefault(cell.artefact, []).append(case_kind(cell.case))
    ordered = sorted(map(names, by_artefact.values()), key=len, reverse=True)
    return names(kind for kinds in ordered for kind in kinds)
