"""What stands in a parity report as evidence: hashes of what was compared, and on what."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_export.dense.judge import ImageCase
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.cases import Case
    from mtl_export.parity.report import ArtefactFiles, ParityReport


def with_evidence(
    report: ParityReport,
    artefacts: Sequence[Artefact],
    cases: Sequence[Case | ImageCase],
    inputs: Path | None,
) -> ParityReport:
    """Return ``report`` with the hashes of what was compared, and on what.

    Args:
        report: What came of it.
        artefacts: What was judged.
        cases: The batches.
        inputs: The user's file of rows, if there was one.
    """
    from mtl_export.checkpoint.hashing import sha256_of_file

    sources = {**report.sources, "cases_sha256": cases_sha256(cases)}
    if inputs is not None:
        sources["inputs_sha256"] = sha256_of_file(inputs)
    versions = {**report.versions, "numpy": version("numpy"), "python": platform.python_version()}
    files = tuple(_files(artefact) for artefact in artefacts if artefact.path is not None)
    return replace(report, sources=sources, versions=versions, artefacts=files)


def cases_sha256(cases: Sequence[Case | ImageCase]) -> str:
    """Return one hash of all batches: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.name}\n".encode())
        for name, value in sorted(case.inputs.items()):
            digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
            digest.update(value.tobytes())
    return digest.hexdigest()


def _files(artefact: Artefact) -> ArtefactFiles:
    from mtl_export.bundle.manifest import own_files, read_manifest
    from mtl_export.checkpoint.hashing import sha256_of_file
    from mtl_export.parity.report import ArtefactFiles

    assert artefact.path is not None
    folder = artefact.path if artefact.path.is_dir() else artefact.path.parent
    manifest = None if artefact.defect else read_manifest(folder)
    if manifest is not None:
        # Without a defect the manifest's hashes have just been found to be true.
        hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
    else:
        there = [path for path in own_files(folder) if path.is_file()] if folder.is_dir() else []
        hashes = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in there}
    return ArtefactFiles(
        artefact=artefact.name,
        task=artefact.task.name if artefact.task else "*",
        path=_shown(artefact.path),
        sha256=hashes,
    )


def _shown(path: Path) -> str:
    """Return ``path`` from the current folder if it lies there, else as it is."""
    absolute = path.absolute()
    here = Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else path).as_posix()
