"""A report as one HTML page that needs no network and runs no script.

Verdict, failures and where they begin, heat maps, error against floor, ECDF, worst examples,
what did not run, evidence, every cell: see ``report.html.j2``. Numbers shown short carry the
exact one in ``data-value``, and the whole JSON report is embedded, so that page and JSON
cannot say different things. Its content policy forbids loading anything.
"""

from __future__ import annotations

from mtl_export.parity.diagnosis.layer_errors import Localisation
from mtl_export.parity.report import Cell, ParityReport
from mtl_export.parity.reports import facts, plots
from mtl_export.parity.reports.json_report import document
from mtl_export.parity.reports.template import rendered

WORST = 10


def html_text(report: ParityReport) -> str:
    """Return the report as an HTML page."""
    maps = {name: plots.heat_map(report, name) for name in facts.artefacts(report)}
    return rendered(
        "report.html.j2",
        report=report,
        document=document(report),
        plots=plots,
        heat_maps={name: drawn for name, drawn in maps.items() if drawn},
        worst=_worst(report),
        found=[(one, _findings(one)) for one in report.localised],
    )


def _worst(report: ParityReport) -> list[Cell]:
    """Return the cells that use most of their limit."""
    shares = [(facts.share(cell), cell) for cell in report.cells]
    compared = [(share, cell) for share, cell in shares if share is not None]
    return [cell for _, cell in sorted(compared, key=lambda pair: -pair[0])[:WORST]]


def _findings(found: Localisation) -> list[str]:
    """Return what is known of where the errors of one artefact begin, in sentences."""
    lines = [f"{one.task}: {one.text}" for one in found.findings]
    if found.reason:
        lines.append(f"not localised: {found.reason}")
    elif found.unseen:
        lines.append(f"not seen under their names: {', '.join(found.unseen)}")
    if found.bisection is not None:
        lines.append(found.bisection.text)
    return lines
