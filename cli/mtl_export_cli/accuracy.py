"""``parity --dataset``: its options, and the table of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mtl_export.api.accuracy import SCORES
from mtl_export_cli import render
from mtl_export_cli.options import MAX_DROP, Decorator, option

if TYPE_CHECKING:
    from mtl_export.parity.report import ParityReport


def _scores(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Return ``NAME`` and ``TASK:NAME`` options as scores by task, "" for all others."""
    scores = {}
    for value in values:
        task, _, name = value.rpartition(":")
        if name not in SCORES:
            raise click.BadParameter(f"{value!r}: a score is one of {', '.join(SCORES)}")
        scores[task] = name
    return scores


OPTIONS: tuple[Decorator, ...] = (
    option("--dataset", metavar="DATA",
           help="Labelled rows to count accuracy on: JSONL with task, text and label, arrays.npz"
           " with task_ids and labels, or module:function."),
    MAX_DROP,
    option("--score", multiple=True, metavar="[TASK:]NAME", callback=_scores,
           help=f"Score of a task, or of all: {', '.join(SCORES)}; by default what is usual for"
           " its kind."),
)  # fmt: skip


def print_accuracy(report: ParityReport) -> None:
    """Print the scores as a table, if there are any."""
    from mtl_export.parity.reports import facts

    if not report.accuracy:
        return
    for cell in report.accuracy:
        if cell.verdict != "passed":
            word = "FAILED" if cell.verdict == "failed" else "not run:"
            render.print_line(
                f"{word} {cell.artefact}, task {cell.task}, {cell.score}: {cell.reason}"
            )
    rows = [facts.accuracy_row(cell) for cell in report.accuracy]
    allowed = 100 * report.accuracy[0].allowed
    title = f"accuracy {report.accuracy_verdict}: the worst task may lose {allowed:g} points"
    render.print_table(facts.ACCURACY_COLUMNS, rows, title=title)
