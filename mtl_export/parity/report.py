"""What was compared and what came of it: records, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mtl_export.errors import shortened
from mtl_export.parity.diagnosis.layer_errors import Finding, Localisation

Verdict = Literal["passed", "failed", "not-run"]
SCHEMA = "mtl-export.parity/1"
# The case of a cell that is about the whole artefact.
WHOLE = "*"


@dataclass(frozen=True, slots=True)
class Cell:
    """One artefact under one case, for one task.

    Attributes:
        artefact: Its name.
        runtime: What ran it.
        task: Task name; "*" where no single task is judged.
        case: The batch.
        verdict: A check that could not run is ``not-run``, never ``passed``.
        reason: Why it failed or did not run; empty when passed.
        max_abs_error: Against the float64 oracle; None when nothing was compared.
        noise_floor: The task's; None likewise.
        limit: Largest error allowed where the worst one was; None likewise.
        decisions: Compared, equal and tied decisions; None likewise.
        output: Which output of the model was compared; empty likewise.
        least_atol: The least absolute tolerance that the errors would pass under, beside the
            relative one in force; None likewise. It mends no changed decision.
        sqnr_db: Signal to noise of the logits over all cases; of quantised artefacts only.
    """

    artefact: str
    runtime: str
    task: str
    case: str
    verdict: Verdict
    reason: str = ""
    max_abs_error: float | None = None
    noise_floor: float | None = None
    limit: float | None = None
    decisions: tuple[int, int, int] | None = None
    output: str = ""
    least_atol: float | None = None
    sqnr_db: float | None = None

    def judged(self, case: str, *problems: str) -> Cell:
        """Return the cell of a case: failed for these problems, passed where all are empty."""
        found = [problem for problem in problems if problem]
        reason = shortened(found) if found else ""
        return replace(self, case=case, verdict="failed" if found else "passed", reason=reason)

    def not_run(self, case: str, reason: str) -> Cell:
        """Return the cell of a case that was not run, and why."""
        return replace(self, case=case, verdict="not-run", reason=reason)


@dataclass(frozen=True, slots=True)
class AccuracyCell:
    """One artefact's score on one task's rows.

    Attributes:
        artefact: Its name.
        task: The task's name.
        score: Which score, a key of ``scores.SCORES``.
        rows: How many rows.
        reference: Score of the model it came from; None where the artefact was not asked.
        candidate: Its own; None where it has none.
        low: Lower end of the interval of the drop; None likewise.
        high: Upper end; None likewise.
        allowed: Largest drop allowed.
        verdict: See ``parity.accuracy``.
        reason: Why it did not pass; empty when it did.
    """

    artefact: str
    task: str
    score: str
    rows: int
    reference: float | None
    candidate: float | None
    low: float | None
    high: float | None
    allowed: float
    verdict: Verdict
    reason: str = ""

    @property
    def drop(self) -> float | None:
        """Return how much lower the candidate scores; negative where it scores higher."""
        if self.reference is None or self.candidate is None:
            return None
        return self.reference - self.candidate

    @property
    def is_undecided(self) -> bool:
        """Return whether it was scored, and the rows cannot tell."""
        return self.verdict == "not-run" and self.candidate is not None


@dataclass(frozen=True)
class RecordedTask:
    """What calibrate counted for one task of a quantised graph, and kept beside it.

    Attributes:
        artefact: Its name, as in the cells.
        task: The task's name.
        rows: Rows it was counted on.
        labelled: Of these, with a label.
        drop: Points of accuracy lost, of changed decisions where there are no labels.
        accuracy: By format, ``fp32``, ``fp16`` and the graph's own; empty without labels.
        sqnr_db: Of the logits against fp32, by format.
        latency_ms: In ONNX Runtime where calibrate ran last, by format; empty if unknown.
        allowed: Points that may be lost.
        allowed_by: Who said so.
    """

    artefact: str
    task: str
    rows: int
    labelled: int
    drop: float
    accuracy: Mapping[str, float]
    sqnr_db: Mapping[str, float]
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    allowed: float = 1.0
    allowed_by: str = "by default"


@dataclass(frozen=True)
class ArtefactFiles:
    """What an artefact consisted of when it was judged.

    Attributes:
        artefact: Its name, as in the cells.
        task: Its task, as in the cells; "*" where it serves all.
        path: Its file or folder, from where the command ran, with ``/``.
        sha256: Of each of its files, by name.
    """

    artefact: str
    task: str
    path: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class ParityReport:
    """All cells of one run.

    Attributes:
        cells: In the order they were run.
        tolerance: The rule, in words.
        noise_floors: By dtype, then by task name.
        sources: SHA-256 of base, checkpoint and inputs.
        versions: Of what computed the numbers.
        artefacts: The files that were judged.
        error: What kept the comparison from being made, as ``MtlExportError.as_dict``;
            empty when it was made.
        accuracy: Of labelled rows, by artefact and task; empty where none were given.
        localised: Where the error of each artefact that failed begins; empty where nobody asked.
        quantised: What calibrate counted for quantised graphs.
    """

    cells: tuple[Cell, ...]
    tolerance: str
    noise_floors: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, str]
    versions: Mapping[str, str]
    artefacts: tuple[ArtefactFiles, ...] = ()
    error: Mapping[str, str] = field(default_factory=dict)
    accuracy: tuple[AccuracyCell, ...] = ()
    localised: tuple[Localisation, ...] = ()
    quantised: tuple[RecordedTask, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Return the verdict on all: numbers, contract, and accuracy where it was asked for."""
        both = {self.parity_verdict}
        if self.accuracy:
            both.add(self.accuracy_verdict)
        return "failed" if "failed" in both else "not-run" if "not-run" in both else "passed"

    @property
    def parity_verdict(self) -> Verdict:
        """Return ``failed`` if any cell failed, ``passed`` if any passed, else ``not-run``.

        What is known of files alone passes nothing for an artefact that could not be run.
        """
        if any(cell.verdict == "failed" for cell in self.cells):
            return "failed"
        absent = {
            (cell.artefact, cell.task)
            for cell in self.cells
            if cell.verdict == "not-run" and cell.case == WHOLE
        }
        ran = (cell for cell in self.cells if (cell.artefact, cell.task) not in absent)
        return "passed" if any(cell.verdict == "passed" for cell in ran) else "not-run"

    @property
    def least_tolerances(self) -> dict[str, tuple[float, float]]:
        """Return, by output, the least atol and the least k that every error passes under.

        The least atol is the one beside the rtol in force; k is in noise floors. Neither mends
        a decision that changed.
        """
        found: dict[str, tuple[float, float]] = {}
        for cell in self.cells:
            if cell.least_atol is not None and cell.max_abs_error is not None:
                atol, factor = found.get(cell.output, (0.0, 0.0))
                own = cell.max_abs_error / cell.noise_floor if cell.noise_floor else 0.0
                found[cell.output] = max(atol, cell.least_atol), max(factor, own)
        return found

    @property
    def accuracy_verdict(self) -> Verdict:
        """Return ``failed`` if a task failed, ``not-run`` if rows cannot tell or none passed."""
        verdicts = {cell.verdict for cell in self.accuracy}
        if "failed" in verdicts:
            return "failed"
        undecided = any(cell.is_undecided for cell in self.accuracy)
        return "passed" if "passed" in verdicts and not undecided else "not-run"

    def count(self, verdict: Verdict) -> int:
        """Return how many cells have ``verdict``."""
        return sum(cell.verdict == verdict for cell in self.cells)

    def finding(self, cell: Cell) -> Finding | None:
        """Return where the error of a failed cell begins; None where that is not known."""
        for one in self.localised:
            if one.artefact == cell.artefact and one.task in {cell.task, "*"}:
                return one.finding(cell.task)
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "counts": {v: self.count(v) for v in ("passed", "failed", "not-run")},
            "tolerance": self.tolerance,
            "least_tolerances": {
                output: {"atol": atol, "noise_floors": factor}
                for output, (atol, factor) in self.least_tolerances.items()
            },
            "noise_floors": {dtype: dict(by_task) for dtype, by_task in self.noise_floors.items()},
            "sources": dict(self.sources),
            "versions": dict(self.versions),
            "error": dict(self.error),
            "artefacts": [
                {**asdict(files), "sha256": dict(files.sha256)} for files in self.artefacts
            ],
            "cells": [asdict(cell) for cell in self.cells],
            "accuracy": {
                "verdict": self.accuracy_verdict,
                "cells": [{**asdict(cell), "drop": cell.drop} for cell in self.accuracy],
            },
            "localised": [one.as_dict() for one in self.localised],
            "quantised": [asdict(one) for one in self.quantised],
        }


def worst_by_artefact(cells: Sequence[AccuracyCell]) -> dict[str, AccuracyCell]:
    """Return each artefact's cell with the largest drop; an unscored failure is larger than any."""
    found: dict[str, AccuracyCell] = {}
    for cell in cells:
        known = found.get(cell.artefact)
        if known is None or _size(cell) > _size(known):
            found[cell.artefact] = cell
    return found


def _size(cell: AccuracyCell) -> float:
    if cell.drop is None:
        return float("inf") if cell.verdict == "failed" else float("-inf")
    return cell.drop


def worst(cells: list[Cell]) -> Cell:
    """Return the cell that speaks for ``cells``: a failure, else the largest share of its limit.

    Of a quantised artefact that passed, it is the one with its noise. A cell that did not run
    speaks only when none ran, or when it is the whole artefact that did not: what is known of
    its files passes nothing then.
    """

    def rank(cell: Cell) -> tuple[int, bool, float]:
        severity = {"failed": 3, "passed": 1, "not-run": 2 if cell.case == WHOLE else 0}
        is_noise = cell.sqnr_db is not None
        share = 0.0
        if cell.max_abs_error is not None and cell.limit:
            share = cell.max_abs_error / cell.limit
        return severity[cell.verdict], is_noise, share

    return max(cells, key=rank)
