"""``parity --golden``: what passed answers a few rows again, and the answers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.errors import OutputError

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.cases import Case
    from mtl_export.parity.report import ParityReport
    from mtl_export.parity.tolerance import Tolerance
    from mtl_export.runtime.golden import Vector


def save_golden(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    cases: Sequence[Case],
    report: ParityReport,
    tolerance: Tolerance,
) -> list[Path]:
    """Save golden vectors beside every graph and engine that did not fail; return the files.

    An engine that could not be run gets those of the graph of its layout, if that passed.
    Quantised ones get none: processors round in their integer kernels each in its own way.
    A graph whose tasks were edited keeps those it has.
    """
    from mtl_export.parity.golden import for_engine, golden_vectors

    saved: list[Path] = []
    of_graphs: dict[str, tuple[Vector, ...]] = {}
    for artefact in artefacts:
        verdicts = verdicts_of(report, artefact)
        name = artefact.task.name if artefact.task else "*"
        if artefact.path is None or artefact.path.suffix not in {".onnx", ".engine"}:
            continue
        if "failed" in verdicts or artefact.defect or artefact.quantised is not None:
            continue
        if artefact.edited is not None:
            continue  # it keeps what was saved before, of tasks of other checkpoints too
        if "passed" in verdicts:
            floors = report.noise_floors[artefact.dtype]
            with artefact.runner:
                vectors = golden_vectors(artefact, cases, bound.adapters.tasks, floors, tolerance)
        else:
            vectors = for_engine(of_graphs.get(name, ()), artefact.path.name)
        if artefact.path.suffix == ".onnx":
            of_graphs[name] = vectors
        if vectors:
            saved.append(write_golden(artefact.path.parent, vectors))
    return saved


def verdicts_of(report: ParityReport, artefact: Artefact) -> set[str]:
    """Return the verdicts of an artefact's cells."""
    own = {artefact.task.name, "*"} if artefact.task else None
    return {
        cell.verdict
        for cell in report.cells
        if cell.artefact == artefact.name and (own is None or cell.task in own)
    }


def write_golden(folder: Path, vectors: Sequence[Vector]) -> Path:
    """Write ``golden.npz`` and enter it in the folder's manifest; return the file.

    Raises:
        OutputError: It cannot be written.
    """
    from mtl_export.bundle.manifest import add_to_manifest
    from mtl_export.runtime.golden import GOLDEN_FILE, golden_bytes

    path = folder / GOLDEN_FILE
    try:
        partial = folder / f"{GOLDEN_FILE}.partial"
        partial.write_bytes(golden_bytes(vectors))
        partial.replace(path)
        add_to_manifest(folder, GOLDEN_FILE)
    except OSError as error:
        raise OutputError(
            f"{path}: it cannot be written ({error.strerror})",
            expected="a folder you may write to",
            fix="Leave out --golden, or make the folder writable",
        ) from error
    return path
