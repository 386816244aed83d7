"""What ``mtl-export calibrate`` found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_export.errors import shortened
from mtl_export_cli import render

if TYPE_CHECKING:
    from mtl_export_calibration.measure import Options
    from mtl_export_calibration.report import GraphReport, Outcome

OWN_ENGINE = "onnxruntime"
# Formats that cost less accuracy.
GENTLER = {"int4": ("int8", "fp8"), "int8": ("fp8",), "fp8": ()}


def print_outcomes(outcomes: Sequence[Outcome], options: Options) -> None:
    """Print all graphs."""
    number = options.number.name
    columns = (
        *("graph", "task", "rows", "fp32", "fp16", number, "drop", "same", "SQNR", "range"),
        *("cut", "verdict"),
    )
    rows = [row for outcome in outcomes for row in _rows(outcome.report)]
    how = options.method
    if options.engine != OWN_ENGINE:
        how += f" by {options.engine}"
    title = f"{number}, {how}; the worst task may lose {options.max_drop:g} points"
    render.print_table(columns, rows, title=title, right=columns[2:-1])
    for outcome in outcomes:
        for line in _lines(outcome):
            render.print_line(f"{outcome.report.graph}: {line}")


def _rows(report: GraphReport) -> list[tuple[str, ...]]:
    rows = []
    half = {score.task: score.accuracy for score in report.half}
    for score in report.scores:
        inflation, widest = report.measured.inflation(score.task)
        cut = report.cut(score.task)
        accuracies = (score.float_accuracy, half.get(score.task), score.accuracy)
        rows.append(
            (
                report.graph,
                score.task,
                f"{score.rows:,}",
                *("" if value is None else f"{100 * value:.2f}" for value in accuracies),
                f"{score.drop:.2f}",
                f"{100 * score.agreement:.2f} %",
                f"{score.sqnr_db:.1f} dB",
                f"{inflation:.2f}x" if widest else "",
                f"{100 * cut.share:.2f} %" if cut.activation else "",
                "FAILED" if report.failure(score) else "passed",
            )
        )
    return rows


def _lines(outcome: Outcome) -> list[str]:
    report, lines = outcome.report, []
    for score in report.scores:
        if why := report.failure(score):
            lines.append(f"{score.task}: {why}")
    if report.latency_ms:
        before = report.latency_ms["fp32"]
        times = [
            f"{name} {time:.1f} ms ({time / before:.2f}x)"
            for name, time in report.latency_ms.items()
        ]
        lines.append(f"ONNX Runtime, 8 x {report.latency_length}: {', '.join(times)}")
    total = len(report.measured.sqnr_db)
    if report.excluded or report.trials > 1:
        names = f": {shortened(report.excluded)}" if report.excluded else ""
        lines.append(f"{len(report.excluded)} of {total} layers left unquantised"
                     f" after {report.trials} trials{names}")  # fmt: skip
    if report.apart:
        lines.append(
            f"{len(report.apart)} layers add the task's change in high precision, because a"
            f" step of the weight is larger: {shortened(report.apart)}"
        )
    lines += list(report.notes)
    if outcome.written:
        size = render.size_text(outcome.written.size_bytes)
        lines.append(f"{outcome.written.path}: {size}, {outcome.written.status}")
    else:
        lines += ["not written, because a task does not pass", _next(report)]
    return lines


def _next(report: GraphReport) -> str:
    """Return what may help a graph that failed."""
    if report.worst_drop <= report.max_drop:
        return "give --data rows like those of --judge, or pass a larger --max-cut"
    gentler = GENTLER[report.number]
    other = f"--quantize {' or '.join(gentler)}, " if gentler else ""
    return (
        f"try {other}--max-excluded to leave more layers unquantised (their share), more"
        f" --samples, or allow the loss by --max-drop"
    )
