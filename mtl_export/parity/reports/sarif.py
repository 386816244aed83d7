"""A report as SARIF 2.1.0: one result per failed cell, located at the artefact's file.

Only failures are results, because code scanning shows every result as an alert. What did
not run is a notification of the run; what passed is counted in its properties.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html, sections given below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from mtl_export.parity.report import AccuracyCell, ArtefactFiles, Cell, ParityReport
from mtl_export.parity.reports import facts
from mtl_export.version import VERSION

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"
# id -> name, what is wrong, what to do
RULES = {
    "parity-artefact": (
        "ArtefactUnusable",
        "The files are damaged, made from another checkpoint or base, or do not run.",
        "Export them again from the checkpoint and the base that are meant to ship.",
    ),
    "parity-contract": (
        "ContractBroken",
        "A promise that holds for all tasks is broken: an id that no task has is answered, or"
        " a row depends on its neighbours' tasks.",
        "Do not ship the artefact; export it again.",
    ),
    "parity-output": (
        "OutputWrong",
        "An output is missing, misshapen, not finite, or answered by a head of another task.",
        "Do not ship the artefact; export it again.",
    ),
    "parity-error": (
        "ErrorBeyondTolerance",
        "The error against the unmerged model in float64 is larger than arithmetic explains.",
        "Look at the HTML report for the tasks and batches it concerns; do not loosen the"
        " tolerance before the cause is known.",
    ),
    "parity-decision": (
        "DecisionChanged",
        "The errors are small, but a decision differs from the unmerged model's.",
        "Look at the rows in question; another dtype may be needed.",
    ),
    "parity-accuracy": (
        "AccuracyDropped",
        "On labelled rows a task scores lower than the unmerged model, by more than is allowed"
        " and more than chance explains.",
        "Do not ship the artefact; quantise less of it, or in another way.",
    ),
}


def sarif_text(report: ParityReport) -> str:
    """Return the report as a SARIF log."""
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [_run(report)]}
    return json.dumps(log, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rule_of(cell: Cell) -> str:
    """Return the id of the rule that a failed cell broke."""
    if cell.case == facts.ALL:
        return "parity-artefact"
    if cell.max_abs_error is None:
        return "parity-contract" if cell.task == facts.ALL else "parity-output"
    total, equal, ties = cell.decisions or (0, 0, 0)
    within = cell.limit is not None and cell.max_abs_error <= cell.limit
    return "parity-decision" if within and total > equal + ties else "parity-error"


def _run(report: ParityReport) -> dict[str, Any]:
    rules = [
        {
            "id": rule,
            "name": name,
            "shortDescription": {"text": text},
            "fullDescription": {"text": text},
            "help": {"text": advice},
            "defaultConfiguration": {"level": "error"},
        }
        for rule, (name, text, advice) in RULES.items()
    ]
    driver = {"name": "mtl-export", "version": VERSION, "rules": rules}
    return {
        "tool": {"driver": driver},
        "automationDetails": {"id": "mtl-export/parity/"},
        "invocations": [_invocation(report)],
        "artifacts": [_artifact(file) for file in _files(report)],
        "results": [_result(report, cell) for cell in facts.failures(report)]
        + [_dropped(report, cell) for cell in report.accuracy if cell.verdict == "failed"],
        "properties": {
            "verdict": report.verdict,
            "counts": {verdict: report.count(verdict) for verdict in facts.VERDICTS},
            "tolerance": report.tolerance,
            "least_tolerances": report.as_dict()["least_tolerances"],
            "sources": dict(report.sources),
            "versions": dict(report.versions),
        },
    }


def _invocation(report: ParityReport) -> dict[str, Any]:
    """Section 3.20: the command worked, unless it could not judge."""
    notes: list[dict[str, Any]] = [
        {"level": "note", "message": {"text": f"not run: {artefact}, {tasks}: {reason}"}}
        for artefact, tasks, reason in facts.not_run(report)
    ]
    notes += [
        {"level": "note", "message": {"text": f"accuracy not run: {_told(cell)}"}}
        for cell in report.accuracy
        if cell.verdict == "not-run"
    ]
    if report.error:
        notes.insert(0, {"level": "error", "message": {"text": facts.error_text(report)}})
    return {"executionSuccessful": not report.error, "toolExecutionNotifications": notes}


def _result(report: ParityReport, cell: Cell) -> dict[str, Any]:
    rule = rule_of(cell)
    task = "all tasks" if cell.task == facts.ALL else f"task {cell.task}"
    key = "\n".join((rule, cell.artefact, cell.task, cell.case))
    numbers = {
        "max_abs_error": cell.max_abs_error,
        "noise_floor": cell.noise_floor,
        "limit": cell.limit,
        "decisions": list(cell.decisions) if cell.decisions else None,
    }
    text = f"{cell.artefact}, {task}, {cell.case}: {cell.reason}"
    alert = _alert(report, cell, rule, text, key, numbers)
    finding = report.finding(cell)
    if finding is None or not finding.layer:
        return alert
    alert["message"] = {"text": f"{text}; {finding.text}"}
    # Section 3.33: what in the file it is about, in the words of the model.
    layer = {"fullyQualifiedName": finding.layer, "kind": "module"}
    alert["locations"] = [
        {**location, "logicalLocations": [layer]} for location in alert["locations"]
    ]
    alert["properties"] |= {"layer": finding.layer, "cause": finding.cause}
    return alert


def _dropped(report: ParityReport, cell: AccuracyCell) -> dict[str, Any]:
    rule = "parity-accuracy"
    key = "\n".join((rule, cell.artefact, cell.task, cell.score))
    numbers = {
        "reference": cell.reference, "candidate": cell.candidate, "drop": cell.drop,
        "low": cell.low, "high": cell.high, "allowed": cell.allowed,
    }  # fmt: skip
    return _alert(report, cell, rule, _told(cell), key, numbers)


def _told(cell: AccuracyCell) -> str:
    return f"{cell.artefact}, task {cell.task}, {cell.score} of {cell.rows} rows: {cell.reason}"


def _alert(
    report: ParityReport,
    cell: Cell | AccuracyCell,
    rule: str,
    text: str,
    key: str,
    numbers: Mapping[str, object],
) -> dict[str, Any]:
    where = [_uri(files) for files in report.artefacts if _is_of(files, cell)][:1]
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": "error",
        "message": {"text": text},
        # A binary file has no lines, but code scanning shows no result without one.
        "locations": [
            {"physicalLocation": {"artifactLocation": _at(uri), "region": {"startLine": 1}}}
            for uri in where
        ],
        # Section 3.27.17: the same fault of the next run is the same alert.
        "partialFingerprints": {"cell/v1": hashlib.sha256(key.encode()).hexdigest()},
        "properties": {name: value for name, value in numbers.items() if value is not None},
    }


def _is_of(files: ArtefactFiles, cell: Cell | AccuracyCell) -> bool:
    return files.artefact == cell.artefact and files.task in {cell.task, facts.ALL}


def _uri(files: ArtefactFiles) -> str:
    """Return the one file that stands for the artefact."""
    path = PurePosixPath(files.path)
    if path.name in files.sha256 or not files.sha256:
        return files.path
    weights = [name for name in sorted(files.sha256) if name.endswith(".safetensors")]
    return (path / (weights or sorted(files.sha256))[0]).as_posix()


def _files(report: ParityReport) -> list[tuple[str, str]]:
    """Return path and SHA-256 of every file that was judged."""
    found: dict[str, str] = {}
    for files in report.artefacts:
        path = PurePosixPath(files.path)
        folder = path.parent if path.name in files.sha256 else path
        found |= {(folder / name).as_posix(): digest for name, digest in files.sha256.items()}
    return sorted(found.items())


def _artifact(file: tuple[str, str]) -> dict[str, Any]:
    path, digest = file
    roles = ["analysisTarget"]
    return {"location": _at(path), "roles": roles, "hashes": {"sha-256": digest}}


def _at(path: str) -> dict[str, str]:
    if path.startswith("/"):
        return {"uri": f"file://{quote(path)}"}
    return {"uri": quote(path), "uriBaseId": ROOT}
