"""Where errors begin, as a part of the HTML report: findings, and errors by layer and task."""

from __future__ import annotations

from mtl_export.parity.diagnosis.layer_errors import Localisation
from mtl_export.parity.report import ParityReport
from mtl_export.parity.reports import facts, html_plots
from mtl_export.parity.reports.facts import escaped


def layers_html(report: ParityReport) -> str:
    """Return the content of the section; "" where nothing was localised."""
    if not report.localised:
        return ""
    said = (
        "Each square is a layer under a task, in the order they run; the bluer, the more noise"
        " floors its error has. A cross marks a layer that is wrong itself: on the input that the"
        " artefact gave it, the unmerged model's layer makes something else."
    )
    parts = [f'<p class="muted">{escaped(said)}</p>']
    if any(one.layers for one in report.localised):
        parts.append(f"{html_plots.layer_legend()}<br>")
    return "".join([*parts, *(_one(one) for one in report.localised)])


def _one(found: Localisation) -> str:
    name = found.artefact if found.task == facts.ALL else f"{found.artefact}, {found.task}"
    lines = [f"{one.task}: {one.text}" for one in found.findings]
    if found.reason:
        lines.append(f"not localised: {found.reason}")
    if found.unseen and not found.reason:
        lines.append(f"not seen under their names: {', '.join(found.unseen)}")
    if found.bisection is not None:
        lines.append(found.bisection.text)
    told = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    caption = f"<figcaption>{escaped(name)}</figcaption>"
    return f"<figure>{caption}<ul>{told}</ul>{html_plots.layer_map(found)}</figure>"
