"""A report as JUnit XML: one suite per artefact, one case per cell and score.

    passed     a case
    failed     a case with ``failure``
    not-run    a case with ``skipped`` and the reason: never a pass
    an error of ours, which left nothing to judge: one case with ``error``

Valid against both schemas in use, Jenkins's and Ant's; the stricter asks for a timestamp,
a host and a duration for each suite. None of them is known here, nor wanted: the time is
``SOURCE_DATE_EPOCH`` or 1970, the host ``localhost``, the duration 0.

Source: https://github.com/jenkinsci/xunit-plugin/blob/031e285/src/main/resources/org/jenkinsci/
plugins/xunit/types/model/xsd/junit-10.xsd and
https://github.com/windyroad/JUnit-Schema/blob/2378e66/JUnit.xsd
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from mtl_export.parity.report import AccuracyCell, Cell, ParityReport
from mtl_export.parity.reports import facts


@dataclass(frozen=True)
class _Case:
    """A test case: its name, and the element that says why it did not pass, if any."""

    name: str
    kind: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    details: str | None = None


def junit_text(report: ParityReport) -> str:
    """Return the report as JUnit XML."""
    root = Element("testsuites")
    if report.error:
        text = facts.error_text(report)
        told = {"type": report.error.get("error") or "Error", "message": text}
        case = _Case("the comparison is made", "error", told, text)
        _suite(root, "parity", [case], report.versions)
    said = {"verdict": report.verdict, "tolerance": report.tolerance, **report.sources}
    if least := facts.least_tolerance_line(report):
        said["least tolerance"] = least
    for artefact in facts.artefacts(report):
        cases = [
            _case(f"{cell.task}: {cell.case}", cell, _details(cell, report))
            for cell in report.cells
            if cell.artefact == artefact
        ]
        cases += [
            _case(f"{cell.task}: {cell.score} of {cell.rows} rows", cell, _scored(cell))
            for cell in report.accuracy
            if cell.artefact == artefact
        ]
        _suite(root, artefact, cases, {**said, **report.versions})
    ElementTree.indent(root)
    text = facts.clean(ElementTree.tostring(root, encoding="unicode"))
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(name: str, cell: Cell | AccuracyCell, details: str) -> _Case:
    if cell.verdict == "passed":
        return _Case(name)
    if cell.verdict == "not-run":
        return _Case(name, "skipped", {"message": cell.reason})
    kind = "ParityFailed" if isinstance(cell, Cell) else "AccuracyFailed"
    return _Case(name, "failure", {"type": kind, "message": cell.reason}, details)


def _suite(
    root: Element, artefact: str, cases: Sequence[_Case], properties: Mapping[str, str]
) -> None:
    counts = Counter(case.kind for case in cases)
    suite = SubElement(
        root,
        "testsuite",
        name=_token(artefact),
        package="mtl-export.parity",
        id=str(len(root)),
        hostname="localhost",
        timestamp=_timestamp(),
        time="0",
        tests=str(len(cases)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    holder = SubElement(suite, "properties")
    for name, value in properties.items():
        SubElement(holder, "property", name=_token(name), value=value)
    # Jenkins groups by what precedes the last full stop.
    group = f"mtl-export.parity.{_token(artefact)}"
    seen: Counter[str] = Counter()
    for case in cases:
        name = _token(case.name)
        seen[name] += 1
        # GitLab takes cases of one name for one case.
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        element = SubElement(suite, "testcase", name=unique, classname=group, time="0")
        if case.kind:
            SubElement(element, case.kind, dict(case.attributes)).text = case.details
    told = f"{counts['failure']} of {len(cases)} failed, {counts['skipped']} not run"
    SubElement(suite, "system-out").text = "" if counts["error"] else told
    SubElement(suite, "system-err").text = ""


def _details(cell: Cell, report: ParityReport) -> str:
    lines = [cell.reason, f"artefact: {cell.artefact} ({cell.runtime})", f"task: {cell.task}"]
    lines += [f"case: {cell.case}"]
    if cell.max_abs_error is not None:
        lines += [
            f"largest error: {facts.exact(cell.max_abs_error)}",
            f"allowed there: {facts.exact(cell.limit)}",
        ]
    if cell.noise_floor is not None:
        lines.append(f"noise floor: {facts.exact(cell.noise_floor)}")
    if cell.decisions is not None:
        total, equal, ties = cell.decisions
        lines.append(f"decisions: {equal} of {total} equal, {ties} tied")
    if (finding := report.finding(cell)) is not None:
        lines.append(f"where: {finding.text}")
    return "\n".join(lines)


def _scored(cell: AccuracyCell) -> str:
    told = zip(facts.ACCURACY_COLUMNS, facts.accuracy_row(cell), strict=True)
    return "\n".join([cell.reason, *(f"{name}: {text}" for name, text in told if text)])


def _timestamp() -> str:
    # https://reproducible-builds.org/specs/source-date-epoch/
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(seconds) if seconds.isdigit() else 0, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def _token(text: str) -> str:
    """Return ``text`` as an XML token: single spaces, none at the ends, never empty."""
    return " ".join(facts.clean(text).split()) or "-"
