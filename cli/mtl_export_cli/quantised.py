"""What calibrate counted for quantised graphs, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl_export_cli import render

if TYPE_CHECKING:
    from mtl_export.parity.report import ParityReport


def print_quantised(report: ParityReport) -> None:
    """Print what calibrate counted, if there are quantised graphs."""
    if not report.quantised:
        return
    numbers = list(dict.fromkeys(n for one in report.quantised for n in one.sqnr_db))
    formats = ["fp32", *numbers]
    columns = [
        *("graph", "task", "rows", *formats, "drop", "allowed"),
        *(f"SQNR {name}" for name in numbers),
        *(f"ms {name}" for name in formats),
    ]
    rows = [
        [
            one.artefact,
            one.task,
            f"{one.rows:,}",
            *(_number(one.accuracy.get(name), 100, 2) for name in formats),
            f"{one.drop:.2f}",
            f"{one.allowed:g} {one.allowed_by}",
            *(_number(one.sqnr_db.get(name), 1, 1) for name in numbers),
            *(_number(one.latency_ms.get(name), 1, 1) for name in formats),
        ]
        for one in report.quantised
    ]
    title = "as calibrated: accuracy and points lost against fp32, SQNR in dB, ms in ONNX Runtime"
    render.print_table(columns, rows, title=title, right=columns[2:])


def _number(value: float | None, factor: float, places: int) -> str:
    return "" if value is None else f"{factor * value:.{places}f}"
