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
from collections.abc import Sequence
from datetime import datetime, timezone
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from mtl_export.parity.report import AccuracyCell, Cell, ParityReport
from mtl_export.parity.reports import facts


def junit_text(report: ParityReport) -> str:
    """Return the report as JUnit XML."""
    root = Element("testsuites")
    if report.error:
        _error_suite(root, report)
    for index, artefact in enumerate(facts.artefacts(report), start=len(root)):
        cells = [cell for cell in report.cells if cell.artefact == artefact]
        scores = [cell for cell in report.accuracy if cell.artefact == artefact]
        _suite(root, index, artefact, cells, scores, report)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(
    root: Element,
    index: int,
    artefact: str,
    cells: Sequence[Cell],
    scores: Sequence[AccuracyCell],
    report: ParityReport,
) -> None:
    verdicts = [cell.verdict for cell in cells] + [cell.verdict for cell in scores]
    failed, skipped = verdicts.count("failed"), verdicts.count("not-run")
    suite = _open_suite(root, index, artefact, len(verdicts), failed, 0, skipped)
    properties = SubElement(suite, "properties")
    said = {"verdict": report.verdict, "tolerance": report.tolerance, **report.sources}
    if least := facts.least_tolerance_line(report):
        said["least tolerance"] = least
    for name, value in {**said, **report.versions}.items():
        SubElement(properties, "property", name=_token(name), value=facts.clean(value))
    seen: dict[str, int] = {}
    for cell in cells:
        name = _token(f"{cell.task}: {cell.case}")
        seen[name] = seen.get(name, 0) + 1
        # GitLab takes cases of one name for one case.
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        _case(SubElement(suite, "testcase", _names(unique, artefact)), cell, _details(cell, report))
    for score in scores:
        name = _token(f"{score.task}: {score.score} of {score.rows} rows")
        _case(SubElement(suite, "testcase", _names(name, artefact)), score, _scored(score))
    _close_suite(suite, f"{failed} of {len(verdicts)} failed, {skipped} not run")


def _case(case: Element, cell: Cell | AccuracyCell, details: str) -> None:
    if cell.verdict == "not-run":
        SubElement(case, "skipped", message=facts.clean(cell.reason))
    elif cell.verdict == "failed":
        kind = "ParityFailed" if isinstance(cell, Cell) else "AccuracyFailed"
        failure = SubElement(case, "failure", type=kind, message=facts.clean(cell.reason))
        failure.text = facts.clean(details)


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


def _error_suite(root: Element, report: ParityReport) -> None:
    suite = _open_suite(root, 0, "parity", 1, 0, 1, 0)
    properties = SubElement(suite, "properties")
    for name, value in report.versions.items():
        SubElement(properties, "property", name=_token(name), value=facts.clean(value))
    case = SubElement(suite, "testcase", _names("the comparison is made", "parity"))
    text = facts.clean(facts.error_text(report))
    kind = facts.clean(report.error.get("error") or "Error")
    SubElement(case, "error", type=kind, message=text).text = text
    _close_suite(suite, "")


def _open_suite(
    root: Element, index: int, name: str, tests: int, failures: int, errors: int, skipped: int
) -> Element:
    return SubElement(
        root,
        "testsuite",
        name=_token(name),
        package="mtl-export.parity",
        id=str(index),
        hostname="localhost",
        timestamp=_timestamp(),
        time="0",
        tests=str(tests),
        failures=str(failures),
        errors=str(errors),
        skipped=str(skipped),
    )


def _close_suite(suite: Element, said: str) -> None:
    SubElement(suite, "system-out").text = said
    SubElement(suite, "system-err").text = ""


def _names(name: str, artefact: str) -> dict[str, str]:
    # Jenkins groups by what precedes the last full stop.
    return {"name": name, "classname": f"mtl-export.parity.{_token(artefact)}", "time": "0"}


def _timestamp() -> str:
    # https://reproducible-builds.org/specs/source-date-epoch/
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(seconds) if seconds.isdigit() else 0, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S")


def _token(text: str) -> str:
    """Return ``text`` as an XML token: single spaces, none at the ends, never empty."""
    return " ".join(facts.clean(text).split()) or "-"
