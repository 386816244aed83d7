"""What ``parity`` leaves behind: reports in files, and the evidence that goes into them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.errors import MtlExportError, OutputError, UsageError

if TYPE_CHECKING:
    from mtl_export.parity.cases import Case
    from mtl_export.parity.report import ArtefactFiles, ParityReport
    from mtl_export.parity.run import Artefact


def check_suffixes(paths: Sequence[Path]) -> None:
    """Refuse a report in an unknown format before anything is compared.

    Raises:
        UsageError: A suffix names no format.
    """
    from mtl_export.parity.reports.formats import suffix_of

    for path in paths:
        suffix_of(path)


def write_reports(paths: Sequence[Path], report: ParityReport) -> None:
    """Write ``report`` to every path, in the format of its suffix.

    Raises:
        OutputError: One cannot be written.
    """
    from mtl_export.parity.reports.formats import report_text

    for path in paths:
        text = report_text(report, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise OutputError(
                where=str(path),
                found=f"it cannot be written ({error.strerror})",
                expected="a file in a folder you may write to",
                fix="Pass another file to --report",
            ) from error


@contextmanager
def errors_reported(paths: Sequence[Path]) -> Iterator[None]:
    """Write what ends the block into the reports too.

    Else CI would show the report of an earlier run, which may have passed.
    """
    try:
        yield
    except Exception as error:
        parts = (
            error.as_dict()
            if isinstance(error, MtlExportError)
            else {"error": type(error).__name__, "where": "mtl-export", "found": str(error)}
        )
        write_reports(_known(paths), _report_of(parts))
        raise


class ReportingCommand(click.Command):
    """A command that writes it into its ``--report`` files, too, when its options are refused."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse ``args``, which click does before the command can guard its reports."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except (click.UsageError, MtlExportError) as error:
            # Eager, so known, unless the words themselves could not be told apart.
            paths = ctx.params.get("report") or _typed_reports(words)
            if isinstance(error, MtlExportError):
                parts = error.as_dict()
            else:
                found = error.format_message().rstrip(".")
                parts = {"error": "UsageError", "where": ctx.command_path, "found": found}
            with suppress(OutputError):
                write_reports(_known(paths), _report_of(parts))
            raise


def _typed_reports(words: Sequence[str]) -> list[Path]:
    """Return what ``--report`` names among words that could not be parsed."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [
        Path(word.partition("=")[2] or following)
        for word, following in pairs
        if word == "--report" or word.startswith("--report=")
    ]


def _known(paths: Sequence[Path]) -> list[Path]:
    """Return those whose suffix names a format."""
    from mtl_export.parity.reports.formats import suffix_of

    known = []
    for path in paths:
        with suppress(UsageError):
            suffix_of(path)
            known.append(path)
    return known


def _report_of(error: dict[str, str]) -> ParityReport:
    from mtl_export.parity.report import ParityReport
    from mtl_export.version import VERSION

    return ParityReport((), "", {}, {}, {"mtl-export": VERSION}, error=error)


def with_evidence(
    report: ParityReport, artefacts: Sequence[Artefact], cases: Sequence[Case], inputs: Path | None
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


def cases_sha256(cases: Sequence[Case]) -> str:
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
