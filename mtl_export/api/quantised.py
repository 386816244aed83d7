"""What a quantised graph says of itself, and what calibrate counted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint.files.json_file import Shape, parse_json, read_json
from mtl_export.errors import MtlExportError
from mtl_export.names import QUANTISATION_KEY

if TYPE_CHECKING:
    from mtl_export.parity.artefact import Artefact, Quantised
    from mtl_export.parity.report import RecordedTask

REPORT = "calibration.json"
BY_CALIBRATE = "by calibrate's --max-drop"
HALF = "fp16"
_ABOUT: Shape = {"format?": str}
_TIMES: Shape = {"key": {"files": {str: str}}, "value": {"latency_ms": {str: float}}}


def number_of(metadata: Mapping[str, str]) -> str:
    """Return the format that a graph's metadata name; empty for a float graph."""
    return _about(metadata).get("format") or ""


def read_quantised(
    path: Path, number: str, float_path: Path | None, *, artefact: str, times: Path | None = None
) -> Quantised:
    """Return what is known of the graph at ``path``.

    Args:
        path: The graph; of an engine, anything that is no file.
        number: Its format.
        float_path: The graph it was made from; None is looked for in the folder ``onnx``
            beside the one that holds it.
        artefact: Its name.
        times: Where calibrate keeps what it timed; None where nothing is kept.
    """
    from mtl_export.parity.artefact import Quantised

    if float_path is None and path.is_file():
        roots = [parent for parent in path.parents if parent.name == f"onnx-{number}"]
        float_path = roots[0].with_name("onnx") / path.relative_to(roots[0]) if roots else None
    recorded = _recorded(path, number, artefact, _latencies(path, times) if times else {})
    return Quantised(number, float_path, recorded)


def with_max_drop(artefacts: Sequence[Artefact], points: float) -> list[Artefact]:
    """Return artefacts of which the quantised ones may lose so much, whatever calibrate allowed."""
    return [
        replace(one, quantised=replace(one.quantised, recorded={
            task: replace(record, allowed=points, allowed_by="by --max-drop")
            for task, record in one.quantised.recorded.items()
        }))
        if one.quantised is not None
        else one
        for one in artefacts
    ]  # fmt: skip


def _recorded(
    path: Path, number: str, artefact: str, latency_ms: Mapping[str, float]
) -> dict[str, RecordedTask]:
    """Return what calibrate counted for exactly this graph, by task; nothing if unreadable."""
    from mtl_export.parity.report import RecordedTask
    from mtl_export.runtime.ort import onnx_metadata

    file = path.with_name(REPORT) if path.is_file() else None
    if file is None or not file.is_file():
        return {}
    about = _about(onnx_metadata(path))
    try:
        report = read_json(file)
        half, found = report.get("half", {}), {}
        allowed = float(report["gate"]["max_drop"])
        wanted = (report["data"]["calibration_sha256"], report["excluded"], report["format"])
        for task, score in report["tasks"].items():
            own = half.get(task, {})
            accuracy = {
                "fp32": score["float_accuracy"],
                HALF: own.get("accuracy"),
                number: score["accuracy"],
            }
            noise = {HALF: own.get("sqnr_db"), number: score["sqnr_db"]}
            found[task] = RecordedTask(
                artefact, task, score["rows"], score["labelled"], score["drop"],
                _known(accuracy), _known(noise), latency_ms, allowed, BY_CALIBRATE,
            )  # fmt: skip
    except (MtlExportError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}
    same = (about.get("data_sha256"), about.get("excluded"), about.get("format")) == wanted
    return found if same else {}


def _latencies(path: Path, file: Path) -> dict[str, float]:
    """Return what calibrate timed of exactly these files, by format."""
    from mtl_export.bundle.manifest import read_manifest

    manifest = read_manifest(path.parent)
    try:
        kept = read_json(file, _TIMES)
    except MtlExportError:
        return {}
    files, times = kept["key"]["files"], kept["value"]["latency_ms"]
    entries = manifest.files if manifest else {}
    same = all(name in entries and entries[name].sha256 == digest for name, digest in files.items())
    return {str(name): float(time) for name, time in times.items()} if same else {}


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = parse_json(
        metadata.get(QUANTISATION_KEY) or "{}", QUANTISATION_KEY, _ABOUT, fix="Run calibrate again"
    )
    return found


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
