"""``parity --report``: no report of an earlier run outlives this one, however it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtl_export.api.settings import Settings
from mtl_export.api.sources import lies_in
from mtl_export.errors import MtlExportError, OutputError, UsageError
from mtl_export_cli.system_errors import refusal_of

if TYPE_CHECKING:
    from mtl_export.parity.report import ParityReport

# Stands in the reports until the comparison has ended.
_UNFINISHED = {
    "error": "Unfinished",
    "problem": "mtl-export parity: it is at work, or was interrupted",
    "expected": "a comparison that has ended",
    "fix": "Run it again",
}


@contextmanager
def errors_reported(paths: Sequence[Path], settings: Settings | None = None) -> Iterator[None]:
    """Let no report of an earlier run, which may have passed, outlive this one.

    That this one has not ended stands in the reports while the block is at work, so that a
    kill leaves that; and then what ended it, unless it writes them itself.

    Args:
        paths: The reports.
        settings: What is compared: no report is written into its sources.

    Raises:
        UsageError: The suffix of a path names no format.
        OutputError: A path lies in what is read or was exported, or cannot be written.
    """
    from mtl_export.parity.reports.files import write_reports

    told = [path for path in paths if _is_written(path, settings)]
    write_reports(told, _report_of(_UNFINISHED))
    try:
        for path in paths:
            _refuse_report(path, settings)
        yield
    except Exception as error:
        ours = error if isinstance(error, MtlExportError) else refusal_of(error)
        name = type(error).__name__
        parts = ours.as_dict() if ours else {"error": name, "problem": f"mtl-export: {error}"}
        write_reports(told, _report_of(parts))
        raise


class ReportingCommand(click.Command):
    """A command that writes it into its ``--report`` files, too, when its options are refused."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse ``args``, which click does before the command can guard its reports."""
        from mtl_export.parity.reports.files import write_reports

        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except (click.UsageError, MtlExportError) as error:
            # Eager, so known, unless the words themselves could not be told apart.
            typed = ctx.params.get("report") or _typed_reports(words)
            paths = [path for path in typed if _is_written(path)]
            if isinstance(error, MtlExportError):
                parts = error.as_dict()
            else:
                problem = f"{ctx.command_path}: {error.format_message().rstrip('.')}"
                parts = {"error": "UsageError", "problem": problem}
            with suppress(OutputError):
                write_reports(paths, _report_of(parts))
            raise


def _typed_reports(words: Sequence[str]) -> list[Path]:
    """Return what ``--report`` names among words that could not be parsed."""
    pairs = zip_longest(words, words[1:], fillvalue="")
    return [
        Path(word.partition("=")[2] or following)
        for word, following in pairs
        if word == "--report" or word.startswith("--report=")
    ]


def _refuse_report(path: Path, settings: Settings | None = None) -> None:
    """Refuse a report in an unknown format, or in place of what is kept.

    Raises:
        UsageError: The suffix names no format.
        OutputError: It is a folder, or lies in a source or in an exported folder.
    """
    from mtl_export.parity.reports.formats import suffix_of

    suffix_of(path)
    found = "it is a folder" if path.is_dir() else _holder(path.parent, settings)
    if found:
        raise OutputError(
            f"--report {path}: {found}",
            expected="a file elsewhere, because what is read or was exported is never written to",
            fix="Pass another file to --report",
        )


def _holder(folder: Path, settings: Settings | None) -> str:
    """Return what ``folder`` is a part of that must stay as it is, as a phrase; empty if none."""
    from mtl_export.bundle.manifest import MANIFEST_FILE

    if settings is not None:
        base = Path(settings.base) if settings.base else None
        found = lies_in(folder, {"checkpoint": settings.checkpoint, "base": base})
        if found:
            return found
    place = folder.resolve()
    for outer in (place, *place.parents):
        if (outer / MANIFEST_FILE).is_file():
            return f"it lies in {outer}, which mtl-export wrote"
        # Options that are refused name no source yet, and a base may lie in a package.
        if (outer / "adapter_config.json").is_file() or (
            (outer / "config.json").is_file() and any(outer.glob("*.safetensors"))
        ):
            return f"it lies in {outer}, which holds a model"
    return ""


def _is_written(path: Path, settings: Settings | None = None) -> bool:
    try:
        _refuse_report(path, settings)
    except (UsageError, OSError):
        return False
    return True


def _report_of(error: dict[str, str]) -> ParityReport:
    from mtl_export.parity.report import ParityReport
    from mtl_export.version import VERSION

    return ParityReport((), "", {}, {}, {"mtl-export": VERSION}, error=error)
