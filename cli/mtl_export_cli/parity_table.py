"""What ``parity`` prints: the verdict, why, and a table of tasks by artefacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl_export_cli import render

if TYPE_CHECKING:
    from mtl_export.parity.report import Cell, ParityReport


def print_report(result: ParityReport) -> None:
    """Print ``result``: what failed, what did not run, and a table."""
    from mtl_export.parity.reports import facts

    for cell in result.cells:
        if cell.verdict == "failed":
            render.print_line(
                f"FAILED {cell.artefact}, task {cell.task}, {cell.case}: {cell.reason}"
            )
    for artefact, tasks, reason in facts.not_run(result):
        of_tasks = "" if tasks == "all tasks" else f" of {tasks}"
        render.print_line(f"not run: {artefact}{of_tasks}: {reason}")
    counts = ", ".join(f"{result.count(v)} {v}" for v in ("passed", "failed", "not-run"))
    title = f"parity {result.parity_verdict}: {counts}; rule: {result.tolerance}"
    render.print_table(*_table(result), title=title)
    if least := facts.least_tolerance_line(result):
        render.print_line(least)


def _table(result: ParityReport) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: task by artefact, the worst cell of each speaking for it."""
    from mtl_export.api.artefacts import KINDS

    found = {cell.artefact for cell in result.cells}
    artefacts = [kind for kind in KINDS if kind in found]
    rows = []
    tasks = list(next(iter(result.noise_floors.values())))
    for task in tasks:
        floors = [f"{dtype} {by_task[task]:.1e}" for dtype, by_task in result.noise_floors.items()]
        row = [task, ", ".join(floors)]
        for artefact in artefacts:
            # What holds for all tasks (bad ids, an engine that cannot run) counts for each.
            own = [
                cell
                for cell in result.cells
                if cell.artefact == artefact and cell.task in {task, "*"}
            ]
            row.append(_text(own) if own else "")
        rows.append(row)
    return ["task", "noise floor", *artefacts], rows


def _text(cells: list[Cell]) -> str:
    from mtl_export.parity.report import worst
    from mtl_export.parity.reports import facts

    cell = worst(cells)
    return f"{facts.measured(cell)} {cell.verdict}".lstrip()
