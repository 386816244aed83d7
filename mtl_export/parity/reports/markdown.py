"""A report as Markdown, for a comment on a pull request.

The verdict, what failed, what did not run, and the matrix folded away. GitHub takes
comments of up to 65,536 characters, so long tables are cut, and say so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mtl_export.parity.report import Cell, ParityReport
from mtl_export.parity.reports import facts

MOST_FAILURES = 30
MOST_TASKS = 100
MOST_REASON = 300
_SPECIAL = re.compile(r"[&<>\\`*_\[\]|~@]")
_MARK = {"passed": "✅", "failed": "❌", "not-run": "⚪"}


def markdown_text(report: ParityReport) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    mark = "❌" if report.error else _MARK[report.verdict]
    parts = [f"### {mark} {_text(facts.verdict_line(report))}"]
    if report.tolerance:
        least = facts.least_tolerance_line(report)
        told = f" {_text(least[0].upper() + least[1:])}." if least else ""
        parts.append(f"Rule: {_code(report.tolerance)} and no decision changes.{told}")
    parts += [
        *_failures(report),
        *_localised(report),
        *_accuracy(report),
        *_not_run(report),
        *_matrix(report),
        *_sources(report),
    ]
    return "\n\n".join(parts) + "\n"


def _failures(report: ParityReport) -> list[str]:
    failed = facts.failures(report)
    if not failed:
        return []
    rows = [
        [_text(cell.artefact), _task(cell.task), _text(cell.case), _text(_short(cell.reason)),
         facts.number(cell.max_abs_error), facts.number(cell.limit)]
        for cell in failed[:MOST_FAILURES]
    ]  # fmt: skip
    parts = [_table(["artefact", "task", "case", "why", "error", "allowed"], rows)]
    if len(failed) > len(rows):
        parts.append(f"{len(rows)} of {len(failed)} failures shown, the largest first.")
    return parts


def _localised(report: ParityReport) -> list[str]:
    """Return where the errors begin, a line for each artefact and task."""
    lines = []
    for found in report.localised:
        name = _text(found.artefact)
        if found.reason:
            of_task = "" if found.task == facts.ALL else f", {_text(found.task)}"
            lines.append(f"- {name}{of_task}: not localised: {_text(_short(found.reason))}")
        lines += [
            f"- {name}, {_text(one.task)}: {_text(_short(one.text))}" for one in found.findings
        ]
        if found.bisection is not None:
            lines.append(f"- {name}: {_text(_short(found.bisection.text))}")
    if not lines:
        return []
    cut = "" if len(lines) <= MOST_FAILURES else f"\n\n{MOST_FAILURES} of {len(lines)} shown."
    return ["Where the errors begin:", "\n".join(lines[:MOST_FAILURES]) + cut]


def _accuracy(report: ParityReport) -> list[str]:
    """Return the scores that did not pass, and all of them folded away."""
    if not report.accuracy:
        return []
    marked = [
        [*map(_text, facts.accuracy_row(cell)[:-1]), f"{_MARK[cell.verdict]} {cell.verdict}"]
        for cell in report.accuracy[:MOST_TASKS]
    ]
    table = _table([_text(name) for name in facts.ACCURACY_COLUMNS], marked)
    if len(marked) < len(report.accuracy):
        table += f"\n\n{len(marked)} of {len(report.accuracy)} scores shown."
    lines = [
        f"- {_text(cell.artefact)}, {_text(cell.task)}: {_text(_short(cell.reason))}"
        for cell in report.accuracy
        if cell.verdict != "passed"
    ][:MOST_FAILURES]
    title = "Scores on labelled rows, changes in points"
    folded = f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"
    return [*(["Scores that did not pass:", "\n".join(lines)] if lines else []), folded]


def _not_run(report: ParityReport) -> list[str]:
    lines = [
        f"- {_text(artefact)}, {_text(_short(tasks))}: {_text(_short(reason))}"
        for artefact, tasks, reason in facts.not_run(report)
    ]
    return ["Not run, and so neither passed nor failed:", "\n".join(lines)] if lines else []


def _matrix(report: ParityReport) -> list[str]:
    tasks, artefacts = facts.matrix(report), facts.artefacts(report)
    if not report.cells or not tasks:
        return []
    rows = [
        [_task(task), *(_cell(tasks[task].get(artefact)) for artefact in artefacts)]
        for task in list(tasks)[:MOST_TASKS]
    ]
    table = _table(["task", *map(_text, artefacts)], rows)
    cut = "" if len(rows) == len(tasks) else f"\n\n{len(rows)} of {len(tasks)} tasks shown."
    title = "Every task and artefact, the largest error of each"
    return [f"<details><summary>{title}</summary>\n\n{table}{cut}\n\n</details>"]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{_MARK[cell.verdict]} {cell.verdict} {facts.measured(cell)}".rstrip()


def _sources(report: ParityReport) -> list[str]:
    if not report.sources:
        return []
    rows = [[_text(name), _code(digest)] for name, digest in report.sources.items()]
    rows += [[_text(name), _text(version)] for name, version in report.versions.items()]
    table = _table(["made from, and with", ""], rows)
    return [f"<details><summary>Hashes and versions</summary>\n\n{table}\n\n</details>"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _task(name: str) -> str:
    return "all" if name == facts.ALL else _text(name)


def _short(text: str) -> str:
    return text if len(text) <= MOST_REASON else f"{text[:MOST_REASON]}…"


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _text(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, also inside a table."""
    # References, not backslashes: a backslash does not keep an @ from notifying its bearer.
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", _line(text))


def _line(text: str) -> str:
    return " ".join(facts.clean(text).split())
