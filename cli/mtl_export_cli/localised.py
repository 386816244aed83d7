"""``parity`` after a failure: which layer is wrong, and why, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtl_export_cli import render

if TYPE_CHECKING:
    from mtl_export.parity.diagnosis.layer_errors import LayerError, Localisation
    from mtl_export.parity.report import ParityReport

# Rows of the table of one artefact; the JSON report has all.
MOST_ROWS = 12


def print_layers(result: ParityReport) -> None:
    """Print, for each artefact that failed, where the error begins and the layers it is in."""
    for one in result.localised:
        of_task = "" if one.task == "*" else f", task {one.task}"
        title = f"{one.artefact}{of_task}"
        if one.reason:
            render.print_line(f"not localised: {title}: {one.reason}")
        for finding in one.findings:
            if finding.layer or len(one.findings) == 1:
                render.print_line(f"{one.artefact}, task {finding.task}: {finding.text}")
        if one.unseen and not one.reason:
            render.print_line(f"{title}: not seen under their names: {', '.join(one.unseen)}")
        _print_table(one, title)
        if one.bisection is not None:
            render.print_line(f"{title}: {one.bisection.text}")


def _print_table(one: Localisation, title: str) -> None:
    wrong = [layer for layer in one.layers if layer.verdict != "within"]
    # A layer that is wrong itself says more than one that was given something wrong.
    shown = sorted(wrong, key=lambda layer: layer.verdict != "faulty")[:MOST_ROWS]
    if not shown:
        return
    cut = "" if len(shown) == len(wrong) else f" ({len(shown)} of {len(wrong)} shown)"
    columns = ["layer", "task", "error", "floor", "own error", "own floor", "verdict", "cause"]
    rows = [_row(layer) for layer in shown]
    render.print_table(columns, rows, title=f"layers of {title}{cut}", right=columns[2:6])


def _row(layer: LayerError) -> list[str]:
    sizes = (layer.error, layer.floor, layer.own_error, layer.own_floor)
    numbers = ["-" if size is None else f"{size:.1e}" for size in sizes]
    return [layer.layer, layer.task, *numbers, layer.verdict, layer.cause or layer.detail]
