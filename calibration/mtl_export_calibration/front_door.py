"""``mtl_export_calibration.calibrate``: exported graphs, quantised, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import SourceOptions, refuse_unknown_values, settings_of
from mtl_export.errors import UsageError
from mtl_export.names import LAYOUTS, QUANTISED_DTYPES
from mtl_export_calibration.targets import BOTH

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mtl_export_calibration.report import Outcome

EXIT_FAILED = 4
METHODS = ("max", "percentile", "entropy", "mse")
ENGINES = ("onnxruntime", "modelopt")
COMBINATIONS = ("union", "weighted", "per-task")
DELTAS = ("apart", "exclude", "merged")
# What the plain values of ``calibrate`` may be.
KNOWN = {
    "quantize": QUANTISED_DTYPES,
    "layout": (*LAYOUTS, BOTH),
    "method": METHODS,
    "engine": ENGINES,
    "combine": COMBINATIONS,
    "deltas": DELTAS,
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What became of every graph.

    Attributes:
        graphs: One by one, with what quantising costs each task.
    """

    graphs: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Return whether every graph passed, and so was written."""
        return all(outcome.report.passed for outcome in self.graphs)

    @property
    def exit_code(self) -> int:
        """Return that of ``mtl-export calibrate``: 0, or 4 where a task loses too much."""
        return 0 if self.passed else EXIT_FAILED

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        graphs = [outcome.as_dict() for outcome in self.graphs]
        return {"ok": self.passed, "command": "calibrate", "graphs": graphs}


def calibrate(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    data: str | Path,
    judge: str | Path | None = None,
    quantize: str = "int8",
    layout: str = "both",
    onnx: str | Path | None = None,
    output: str | Path | None = None,
    output_dir: str | Path = "out",
    samples: int = 128,
    seed: int = 0,
    method: str | None = None,
    engine: str = "onnxruntime",
    combine: str | None = None,
    weights: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    deltas: str = "apart",
    max_drop: float | None = None,
    max_cut: float = 3.0,
    max_excluded: float = 0.5,
    force: bool = False,
    threads: int = 0,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> Calibration:
    """Quantise exported graphs, by ranges that respect every task.

    A graph of which a task loses too much is not written, and stands in the record as failed.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        data: Rows to take ranges from: JSONL, a folder, npz, or ``module:function``.
        judge: Rows to count accuracy on; None: those of ``data``.
        quantize: ``int8``, ``fp8`` or ``int4``.
        layout: ``single-graph``, ``per-task`` or ``both``.
        onnx: Holds the graphs; None: ``onnx/`` under ``output_dir``, exported where missing.
        output: Where quantised graphs go; None: ``onnx-int8/`` under ``output_dir``.
        output_dir: The output folder.
        samples: Rows of each task to take ranges from.
        seed: Decides which.
        method: ``max``, ``percentile``, ``entropy`` or ``mse``; None: what suits ``quantize``.
        engine: ``onnxruntime``, or ``modelopt`` for NVIDIA's calibrators.
        combine: ``union``, ``weighted`` or ``per-task``; None: what suits the layout.
        weights: Of tasks, for ``weighted``; 1 unless given.
        exclude: Regular expressions of layers to leave unquantised.
        deltas: ``apart``, ``exclude`` or ``merged``: layers of merged graphs whose steps would
            swallow the task's change.
        max_drop: Points the worst task may lose; None: 1, of fp8 0.5.
        max_cut: Times as often as is usual that a task's values may lie beyond a range.
        max_excluded: Largest share of layers that may be left unquantised.
        force: Replace old results that are different.
        threads: Of ONNX Runtime; 0: all cores.
        progress: Hears what is exported, measured and tried.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: There are no graphs, or an option cannot be had.
        CalibrationError: The data cannot be used, or a task has none.
        BackendMissingError: The engine is not installed.

    Example:
        >>> from mtl_export_calibration import calibrate
        >>> found = calibrate("adapter", base="base", data="rows.jsonl", max_drop=100.0)
        >>> found.passed
        True
    """
    from mtl_export_calibration.formats import format_named
    from mtl_export_calibration.measure import Options
    from mtl_export_calibration.run import CalibrationRequest

    given = {"quantize": quantize, "layout": layout, "method": method, "engine": engine}
    refuse_unknown_values({**given, "combine": combine, "deltas": deltas}, KNOWN)
    if weights and combine != "weighted":
        raise UsageError(
            f"weights: combine is {combine}",
            expected="combine='weighted', because nothing else weighs tasks",
            fix="Leave weights out, or combine by them",
        )
    number = format_named(quantize)
    chosen = Options(
        number=number,
        method=method or number.method,
        combine=combine,
        weights=dict(weights or {}),
        exclude=tuple(exclude),
        deltas=deltas,
        max_drop=number.max_drop if max_drop is None else max_drop,
        max_cut=max_cut,
        max_excluded=max_excluded,
        threads=threads,
        engine=engine,
    )
    settings = replace(
        settings_of(checkpoint, base, source),
        output=None if output is None else Path(output),
        output_dir=Path(output_dir),
        force=force,
    )
    rows, judged = str(data), str(judge or data)
    request = CalibrationRequest(settings, chosen, rows, judged, samples, seed, progress)
    found = request.quantised(layout, None if onnx is None else Path(onnx))
    return Calibration(tuple(found))
