"""A report into files, each in the format of its suffix; none is left half written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mtl_export.errors import OutputError
from mtl_export.parity.report import ParityReport
from mtl_export.parity.reports.formats import report_text


def write_reports(paths: Sequence[Path], report: ParityReport) -> None:
    """Write ``report`` to every path, in the format of its suffix.

    Raises:
        OutputError: One cannot be written.
    """
    for path in paths:
        text = report_text(report, path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(
                f"{path}: it cannot be written ({error.strerror})",
                expected="a file in a folder you may write to",
                fix="Pass another file to --report",
            ) from error
