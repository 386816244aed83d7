"""A file name -> the report in the format that its suffix names.

    .json                   json_report   everything, schema beside it; what programs read
    .xml                    junit         a test case per cell: Jenkins, GitLab, most others
    .sarif, .sarif.json     sarif         a result per failed cell: code scanning
    .md                     markdown      a comment on a pull request
    .html                   html          one page with plots, readable without a network

Nothing is timed and nothing depends on where it runs: one report gives one text.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from mtl_export.errors import UsageError
from mtl_export.parity.report import ParityReport

# Longest suffix first: what ends in .sarif.json ends in .json too.
_RENDERERS = {
    ".sarif.json": ("sarif", "sarif_text"),
    ".sarif": ("sarif", "sarif_text"),
    ".json": ("json_report", "json_text"),
    ".xml": ("junit", "junit_text"),
    ".md": ("markdown", "markdown_text"),
    ".html": ("html", "html_text"),
}
SUFFIXES = (".json", ".xml", ".sarif", ".md", ".html")


def suffix_of(path: Path) -> str:
    """Return the suffix that decides the format of ``path``.

    Raises:
        UsageError: It names no format.
    """
    name = path.name.lower()
    for suffix in _RENDERERS:
        if name.endswith(suffix):
            return suffix
    found = f"the suffix {path.suffix!r} names no format" if path.suffix else "no suffix"
    raise UsageError(
        f"--report {path}: {found}",
        expected=f"one of {', '.join(SUFFIXES)}, because the suffix decides the format",
        fix="Rename it, e.g. parity.html",
    )


def report_text(report: ParityReport, path: Path) -> str:
    """Return ``report`` as the text of ``path``.

    Raises:
        UsageError: The suffix names no format.
    """
    module, function = _RENDERERS[suffix_of(path)]
    render = getattr(import_module(f"mtl_export.parity.reports.{module}"), function)
    text: str = render(report)
    return text
