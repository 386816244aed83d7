"""A report as one HTML page that needs no network and runs no script.

Verdict, failures and where they begin, heat maps, error against floor, ECDF, worst examples,
what did not run, evidence, every cell. Numbers shown short carry the exact one in
``data-value``, and the whole JSON report is embedded, so that page and JSON cannot say
different things. Its content policy forbids loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtl_export.parity.report import Cell, ParityReport
from mtl_export.parity.reports import facts, html_plots
from mtl_export.parity.reports.facts import escaped
from mtl_export.parity.reports.html_layers import layers_html
from mtl_export.parity.reports.html_style import STYLE
from mtl_export.parity.reports.json_report import json_text

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WORST = 10


def html_text(report: ParityReport) -> str:
    """Return the report as an HTML page."""
    title = escaped(facts.verdict_line(report))
    body = [
        _head(report),
        _section("What failed", _cells(facts.failures(report), why=True)),
        _section("Where the errors begin", layers_html(report)),
        _section("Accuracy", _accuracy(report)),
        _section("Tasks and artefacts", _matrix(report)),
        _heat_maps(report),
        _against_floor(report),
        _ecdf(report),
        _worst(report),
        _not_run(report),
        _evidence(report),
        _all_cells(report),
    ]
    # Inside a script element only "</" and "<!--" can end or nest it.
    embedded = json_text(report).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f'\n</main>\n<script type="application/json" id="report">\n{embedded}</script>\n'
        "</body>\n</html>\n"
    )


def _head(report: ParityReport) -> str:
    verdict = "failed" if report.error else report.verdict
    word = "not judged" if report.error else report.verdict.replace("-", " ")
    lines = [f'<h1>Parity <span class="{verdict}">{word}</span></h1>']
    if report.error:
        lines.append(f"<p>{escaped(facts.error_text(report))}</p>")
    if report.accuracy:
        said = escaped(facts.verdict_line(report))
        lines.append(f"<p>{said[0].upper()}{said[1:]}.</p>")
    if report.tolerance:
        lines.append(
            f'<p class="muted">Rule: <code>{escaped(report.tolerance)}</code> against the unmerged'
            f" model in float64, and no decision changes. {escaped(_least(report))}</p>"
        )
    tiles = [
        (f'<b class="{word}" data-count="{word}">{report.count(word)}</b>', label)
        for word, label in zip(facts.VERDICTS, ("passed", "failed", "not run"), strict=True)
    ]
    used = [share for cell in report.cells if (share := facts.share(cell)) is not None]
    if used:
        value = f'<b data-value="{facts.exact(max(used))}">{max(used):.1%}</b>'
        tiles.append((value, "of a limit used, at most"))
    for dtype, floors in report.noise_floors.items():
        floor = max(floors.values(), default=0.0)
        tiles.append(
            (f'<b data-value="{facts.exact(floor)}">{floor:.1e}</b>', f"noise floor, {dtype}")
        )
    boxes = "".join(
        f'<div class="tile">{value}<span>{escaped(name)}</span></div>' for value, name in tiles
    )
    return "\n".join([*lines, f'<div class="tiles">{boxes}</div>'])


def _least(report: ParityReport) -> str:
    line = facts.least_tolerance_line(report)
    return f"{line[0].upper()}{line[1:]}." if line else ""


def _heat_maps(report: ParityReport) -> str:
    figures = [
        f"<figure><figcaption>{escaped(artefact)}</figcaption>{svg}</figure>"
        for artefact in facts.artefacts(report)
        if (svg := html_plots.heat_map(report, artefact))
    ]
    if not figures:
        return ""
    said = "Each square is a task under a case; the bluer, the more of the limit is used."
    content = f'<p class="muted">{said}</p>{html_plots.heat_legend()}<br>{"".join(figures)}'
    return _section("Where the error is", content)


def _against_floor(report: ParityReport) -> str:
    said = (
        "The noise floor is what arithmetic in the artefact's dtype costs the unmerged model"
        " itself; a wrong formula errs by orders of magnitude more."
    )
    plot = html_plots.error_against_floor(report)
    return _section(
        "Error against noise floor", f'<p class="muted">{said}</p>{plot}' if plot else ""
    )


def _ecdf(report: ParityReport) -> str:
    said = "Which part of the cells (up) uses at most which share of what was allowed (across)."
    plot = html_plots.ecdf(report)
    return _section("How close to the limit", f'<p class="muted">{said}</p>{plot}' if plot else "")


def _worst(report: ParityReport) -> str:
    cells = [cell for cell in report.cells if facts.share(cell) is not None]
    cells.sort(key=lambda cell: -(facts.share(cell) or 0.0))
    return _section("Worst examples", _cells(cells[:WORST], why=False))


def _not_run(report: ParityReport) -> str:
    rows = [[escaped(text) for text in group] for group in facts.not_run(report)]
    said = '<p class="muted">What did not run has neither passed nor failed.</p>'
    table = _table(["artefact", "tasks", "why"], rows)
    return _section("Not run", said + table if rows else "")


def _matrix(report: ParityReport) -> str:
    artefacts = facts.artefacts(report)
    rows = []
    for task, cells in facts.matrix(report).items():
        rows.append([escaped(task), *(_spoken(cells.get(artefact)) for artefact in artefacts)])
    return _table(["task", *map(escaped, artefacts)], rows) if rows and artefacts else ""


def _accuracy(report: ParityReport) -> str:
    said = (
        '<p class="muted">Scores on labelled rows, beside the unmerged model in float64; changes'
        " are in points, their interval by paired bootstrap. Rows that cannot tell neither pass"
        " nor fail.</p>"
    )
    rows = []
    for cell in report.accuracy:
        texts = [escaped(text) for text in facts.accuracy_row(cell)]
        for place, value in ((4, cell.reference), (5, cell.candidate)):
            exact = facts.exact(value)
            texts[place] = f'<span data-value="{exact}">{texts[place]}</span>' if exact else ""
        texts[-1] = f'<span class="{cell.verdict}">{cell.verdict.replace("-", " ")}</span>'
        rows.append([*texts, escaped(cell.reason)])
    columns = [*facts.ACCURACY_COLUMNS, "why"]
    table = _table(columns, rows, numbers=(3, 4, 5, 6, 7, 8), name="accuracy")
    return said + table if rows else ""


def _spoken(cell: Cell | None) -> str:
    if cell is None:
        return ""
    word = cell.verdict.replace("-", " ")
    said = _number(cell.max_abs_error) if cell.sqnr_db is None else facts.measured(cell)
    return f'<span class="{cell.verdict}">{word}</span> {said}'


def _evidence(report: ParityReport) -> str:
    rows = [
        [escaped(name), f"<code>{escaped(text)}</code>"] for name, text in report.sources.items()
    ]
    rows += [[escaped(name), escaped(text)] for name, text in report.versions.items()]
    for files in report.artefacts:
        path = escaped(f"{files.artefact}: {files.path}")
        rows += [
            [f"{path}<br>{escaped(name)}", f"<code>{escaped(digest)}</code>"]
            for name, digest in files.sha256.items()
        ]
    if not rows:
        return ""
    table = _table(["what", "SHA-256 or version"], rows)
    return _section(
        "", f"<details><summary>Evidence: hashes and versions</summary>{table}</details>"
    )


def _all_cells(report: ParityReport) -> str:
    if not report.cells:
        return ""
    table = _cells(report.cells, why=True, name="cells")
    return _section(
        "", f"<details><summary>All {len(report.cells)} cells</summary>{table}</details>"
    )


def _cells(cells: Sequence[Cell], *, why: bool, name: str = "") -> str:
    """Return a table of cells, ``why`` they did not pass or how they decided."""
    rows = []
    for cell in cells:
        task = "all" if cell.task == facts.ALL else cell.task
        row = [escaped(cell.artefact), escaped(task), escaped(cell.case)]
        row.append(f'<span class="{cell.verdict}">{cell.verdict.replace("-", " ")}</span>')
        row += [_number(value) for value in (cell.max_abs_error, cell.limit, cell.noise_floor)]
        row.append(escaped(cell.reason) if why else _decided(cell))
        rows.append(row)
    columns = ["artefact", "task", "case", "verdict", "error", "allowed", "floor"]
    last = "why" if why else "decisions"
    return _table([*columns, last], rows, numbers=(4, 5, 6), name=name) if rows else ""


def _decided(cell: Cell) -> str:
    if cell.decisions is None:
        return ""
    total, equal, ties = cell.decisions
    return f"{equal} of {total} equal" + (f", {ties} tied" if ties else "")


def _number(value: float | None) -> str:
    return (
        ""
        if value is None
        else f'<span data-value="{facts.exact(value)}">{facts.number(value)}</span>'
    )


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    name: str = "",
) -> str:
    """Return a table of cells that are HTML already."""
    kinds = [
        "number" if i in numbers else "why" if columns[i] == "why" else ""
        for i in range(len(columns))
    ]
    attributes = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f"<th{a}>{text}</th>" for a, text in zip(attributes, columns, strict=True))
    lines = (
        "".join(f"<td{a}>{text}</td>" for a, text in zip(attributes, row, strict=True))
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    label = f' id="{name}"' if name else ""
    return f"<table{label}><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _section(title: str, content: str) -> str:
    if not content:
        return ""
    heading = f"<h2>{escaped(title)}</h2>" if title else ""
    return f"<section>{heading}{content}</section>"
