"""What is known of an artefact's files before it is run, from hashes alone."""

from __future__ import annotations

from mtl_export.adapters.binding import BoundModel
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.checks.edited_graph import no_task_of


def wrong_files(bound: BoundModel, artefact: Artefact) -> str:
    """Return why an artefact's files need not be run to fail; empty if nothing is known."""
    if artefact.defect:
        return artefact.defect
    expected = {
        "checkpoint": (artefact.checkpoint_sha256, bound.adapters.checkpoint_sha256),
        "base": (artefact.base_sha256, bound.base.sha256),
    }
    edited = artefact.edited
    if edited is not None:
        del expected["checkpoint"]
        if foreign := no_task_of(edited, bound.adapters):
            return foreign
    for name, (found, now) in expected.items():
        if found != now:
            was = f"{found[:12]}..." if found else "an unknown one"
            fix = "export it again" if edited is None else edited.text
            return f"made from {was}, not from this {name} ({now[:12]}...): {fix}"
    return ""
