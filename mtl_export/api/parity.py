"""``mtl_export.parity``: the verdict on everything that was exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api import accuracy, coverage, dense, sources
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.quantised import with_max_drop
from mtl_export.api.settings import Settings, SourceOptions, refuse_unknown_values, settings_of
from mtl_export.errors import MtlExportError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mtl_export.adapters.binding import BoundModel
    from mtl_export.api.artefacts import Places
    from mtl_export.checkpoint.checkpoint import Task
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.cases import Case, Preset
    from mtl_export.parity.report import Cell, ParityReport
    from mtl_export.parity.tolerance import Tolerance


@dataclass(frozen=True, slots=True)
class ParityRequest:
    """What is to be compared, and how.

    Attributes:
        merged: Merged folders; None: those of the output folder, as below.
        onnx: ONNX graphs.
        engines: Engines.
        inputs: The user's rows, or None.
        tolerance: What is allowed.
        dataset: Labelled rows to count accuracy on, or None.
        max_drop: Points the worst task may lose; None: the default.
        scores: Score by task; "" for all others.
        preset: How much is compared.
        threads: Of the runtimes.
        golden: Save golden vectors.
        localise: Say in which layer an error begins.
        bisect: Say which layers must compute in float32, too.
        require_run: What could not be run, or has no export, is an error.
    """

    merged: Path | None
    onnx: Path | None
    engines: Path | None
    inputs: Path | None
    tolerance: Tolerance
    dataset: str | None = None
    max_drop: float | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    preset: Preset = "standard"
    threads: int = 0
    golden: bool = False
    localise: bool = True
    bisect: bool = False
    require_run: bool = False

    def places(self, output_dir: Path) -> Places:
        """Return where the artefacts lie.

        Raises:
            UsageError: A folder that was named is not there.
        """
        from mtl_export.api.artefacts import Places

        return Places(
            _existing("--merged", self.merged) or output_dir / "merged",
            _existing("--onnx", self.onnx) or output_dir / "onnx",
            _existing("--engines", self.engines) or output_dir / "engines",
            output_dir,
        )


@dataclass(frozen=True, slots=True)
class ParityResult:
    """The verdict.

    Attributes:
        report: Every comparison, with what was measured and what is allowed.
        exit_code: That of ``mtl-export parity``: 0, 3 (a number differs), 4 (a task's score
            dropped), 2 (the labelled rows cannot tell) or 6 (something could not be run).
        error: What a 2 or a 6 stands for; else None.
        golden: The files of golden vectors that were saved.
    """

    report: ParityReport
    exit_code: int
    error: MtlExportError | None = None
    golden: tuple[Path, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether everything that was asked for holds."""
        return self.exit_code == 0

    def as_dict(self) -> dict[str, object]:
        """Return the record as JSON's types."""
        from mtl_export.parity.reports.json_report import document

        error = {} if self.error is None else {"error": self.error.as_dict()}
        found = {**document(self.report), **error}
        return {"ok": self.passed, "exit_code": self.exit_code, **found}

    def write(self, *paths: str | Path) -> None:
        """Write the report to every path, as its suffix says: .json, .xml, .sarif, .md, .html.

        Raises:
            UsageError: A suffix names no format.
            OutputError: A file cannot be written.
        """
        from mtl_export.parity.reports.files import write_reports

        write_reports([Path(path) for path in paths], self.report)


def parity(
    checkpoint: str | Path,
    *,
    base: str | Path | None = None,
    output: str | Path = "out",
    merged: str | Path | None = None,
    onnx: str | Path | None = None,
    engines: str | Path | None = None,
    inputs: str | Path | None = None,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    dataset: str | Path | None = None,
    max_drop: float | None = None,
    score: str | Mapping[str, str] | None = None,
    quick: bool = False,
    full: bool = False,
    golden: bool = False,
    localise: bool = True,
    bisect: bool = False,
    require_run: bool = False,
    threads: int = 0,
    progress: Progress = SILENT,
    **source: Unpack[SourceOptions],
) -> ParityResult:
    """Compare everything that was exported with the unmerged PyTorch model in float64.

    A difference is no exception: it stands in the record, with the exit code it has on the
    command line.

    Args:
        checkpoint: The trained adapter.
        base: Folder, ``package:NAME/FOLDER`` or hub id; none belongs to an MTLoRA file.
        output: Holds ``merged/``, ``onnx/`` and ``engines/``, where these are not given.
        merged: Merged folders.
        onnx: ONNX graphs.
        engines: Engines.
        inputs: Rows to compare on, JSONL or npz; None: seeded ones.
        atol: Absolute error allowed, of all outputs or by output; needs ``rtol``. None: 8 times
            what the dtype's own arithmetic costs.
        rtol: Relative error allowed, likewise.
        dataset: Labelled rows to count accuracy on: a file, or ``module:function``.
        max_drop: Points the worst task may lose; None: 1. Needs ``dataset`` or quantised graphs.
        score: Score of all tasks, or by task; None: what is usual. Needs ``dataset``.
        quick: Compare only a batch of each task and one of all.
        full: Compare also around powers of two, and with more seeds.
        golden: Save inputs and outputs beside what passed, for ``verify``.
        localise: When something failed, find the layer in which its error begins.
        bisect: When a half-precision graph failed, find the layers that need float32.
        require_run: What could not be run, or has no export, is an error.
        threads: Of the runtimes; 0: all cores.
        progress: Hears what is compared.
        **source: What the checkpoint does not carry.

    Raises:
        UsageError: There is nothing to compare, or an option would judge nothing.
        CheckpointError: The checkpoint is broken or unsupported; likewise ``BaseModelError``
            and ``AdapterError``.
        CalibrationError: ``inputs`` or ``dataset`` cannot be used.

    Example:
        >>> import mtl_export as mx
        >>> result = mx.parity("adapter", base="base", onnx="out/onnx", quick=True)
        >>> result.passed, result.report.parity_verdict
        (True, 'passed')
    """
    from mtl_export.parity.cases import preset_of
    from mtl_export.parity.tolerance import Tolerance

    scores = {"": score} if isinstance(score, str) else dict(score or {})
    refuse_unknown_values(scores, dict.fromkeys(scores, accuracy.SCORES))
    given = {"max_drop": max_drop, "score": score}
    typed = frozenset(name for name, value in given.items() if value is not None)
    settings = replace(settings_of(checkpoint, base, source), output_dir=Path(output), typed=typed)
    request = ParityRequest(
        merged=_path(merged),
        onnx=_path(onnx),
        engines=_path(engines),
        inputs=_path(inputs),
        tolerance=Tolerance.from_texts(_texts(atol), _texts(rtol)),
        dataset=None if dataset is None else str(dataset),
        max_drop=max_drop,
        scores=scores,
        preset=preset_of(quick, full),
        threads=threads,
        golden=golden,
        localise=localise,
        bisect=bisect,
        require_run=require_run,
    )
    return judge_exports(settings, request, progress)


def judge_exports(settings: Settings, request: ParityRequest, progress: Progress) -> ParityResult:
    """Compare what ``request`` asks for; see ``parity``."""
    from mtl_export.api.artefacts import find_artefacts

    swin = dense.opened(settings)
    places = request.places(settings.output_dir)
    if swin is not None:
        from mtl_export.api import dense_parity

        found = dense_parity.artefacts_of(swin, places, request.threads)
        artefacts = _refuse_idle(*found, places, request, settings)
        report, golden = dense_parity.judged(swin, artefacts, found[1], request, progress)
        return _result(report, golden, artefacts, places, swin.tasks, request)
    bound = sources.open_bound(settings, targets=())
    tasks = bound.adapters.tasks
    gate = accuracy.gate_of(request.dataset, request.max_drop, request.scores)
    artefacts, not_there = find_artefacts(bound, places, threads=request.threads)
    not_there += coverage.unclaimed_cells(places, tasks)
    artefacts = _refuse_idle(artefacts, not_there, places, request, settings)
    report, golden = _Comparison(bound, request, artefacts, not_there, gate, progress).run()
    return _result(report, golden, artefacts, places, tasks, request)


def _result(
    report: ParityReport,
    golden: tuple[Path, ...],
    artefacts: Sequence[Artefact],
    places: Places,
    tasks: Sequence[Task],
    request: ParityRequest,
) -> ParityResult:
    """Return the verdict, of what was not run as well."""
    code, error = accuracy.outcome(report)
    if code == 0 and request.require_run:
        named = [request.merged, request.onnx, request.engines]
        lacking = coverage.lacking_exports(artefacts, places, tasks, named)
        error = coverage.refuse_not_run(report, lacking)
        if error is not None:
            code, report = accuracy.EXIT_MISSING, replace(report, error=error.as_dict())
    return ParityResult(report, code, error, golden)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What is compared with what.

    Attributes:
        bound: The model.
        request: How.
        artefacts: What was exported.
        not_there: A cell for each export that cannot be compared.
        gate: What is asked of accuracy; None without labelled rows.
        progress: Hears of the steps.
    """

    bound: BoundModel
    request: ParityRequest
    artefacts: list[Artefact]
    not_there: list[Cell]
    gate: accuracy.Gate | None
    progress: Progress

    def run(self) -> tuple[ParityReport, tuple[Path, ...]]:
        """Return the report on everything, and the files of golden vectors."""
        from mtl_export.api.evidence import with_evidence
        from mtl_export.api.parity_inputs import base_of, cases_of, oracle_of
        from mtl_export.parity.cases import choose
        from mtl_export.parity.run import RunOptions, run_parity, step_count
        from mtl_export.runtime.runners.pytorch import use_threads

        bound, request, artefacts = self.bound, self.request, self.artefacts
        use_threads(request.threads)
        cases, left_out = choose(cases_of(bound, request.inputs), request.preset)
        rows = accuracy.open_gate(bound, self.gate) if self.gate else None
        self.progress.expect(step_count(artefacts))
        options = RunOptions(left_out, base_of(bound), request.threads, self.progress.begin)
        report = run_parity(
            bound,
            artefacts,
            cases,
            tolerance=request.tolerance,
            oracle=oracle_of(bound),
            options=options,
        )
        report = replace(report, cells=(*report.cells, *self.not_there))
        if request.localise or request.bisect:
            report = self._with_layers(report, cases)
        if rows is not None and self.gate is not None:
            report = accuracy.with_accuracy(
                report, bound, artefacts, rows,
                max_drop=self.gate.max_drop, oracle=oracle_of(bound), progress=self.progress,
            )  # fmt: skip
        golden = self._saved(cases, report) if request.golden else ()
        return with_evidence(report, artefacts, cases, request.inputs), golden

    def _with_layers(self, report: ParityReport, cases: Sequence[Case]) -> ParityReport:
        """Return ``report`` with where the error of each artefact that failed begins."""
        from mtl_export.api.parity_inputs import oracle_of
        from mtl_export.parity.diagnosis.localise import failed_cells, localise
        from mtl_export.parity.diagnosis.precision_bisect import HALF_DTYPES

        bisect = self.request.bisect
        failed = [artefact for artefact in self.artefacts if failed_cells(report, artefact)]
        if not failed:
            return report
        halves = sum(artefact.dtype in HALF_DTYPES for artefact in failed) if bisect else 0
        self.progress.expect(len(failed) + halves)
        found = localise(
            self.bound,
            self.artefacts,
            cases,
            report,
            oracle=oracle_of(self.bound),
            threads=self.request.threads,
            bisect=bisect,
            progress=self.progress.begin,
        )
        return replace(report, localised=found)

    def _saved(self, cases: Sequence[Case], report: ParityReport) -> tuple[Path, ...]:
        from mtl_export.api.golden import save_golden

        saved = save_golden(self.bound, self.artefacts, cases, report, self.request.tolerance)
        for path in saved:
            self.progress.note(f"golden vectors: {path}")
        return tuple(saved)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)


def _texts(allowed: float | Mapping[str, float] | None) -> list[str]:
    """Return numbers as ``Tolerance.from_texts`` takes them."""
    if allowed is None:
        return []
    by_output = allowed if isinstance(allowed, Mapping) else {"": allowed}
    return [f"{name}:{float(value)!r}".removeprefix(":") for name, value in by_output.items()]


def _existing(name: str, folder: Path | None) -> Path | None:
    """Return a folder that the user named.

    Raises:
        UsageError: There is none of that name.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"{name} {folder}: no such folder",
            expected="a folder that mtl-export wrote, because what is not found is not compared",
            fix=f"Correct {name}, or leave it out",
        )
    return folder


def _refuse_idle(
    artefacts: list[Artefact],
    not_there: Sequence[Cell],
    places: Places,
    request: ParityRequest,
    settings: Settings,
) -> list[Artefact]:
    """Return what is judged, with the drop that is allowed.

    Raises:
        UsageError: There is nothing to compare, or an option judges none of it.
    """
    accuracy.refuse_alone(request.dataset, settings.typed, artefacts)
    if not artefacts:
        raise UsageError(
            f"parity: nothing under {places.merged}, {places.onnx} or {places.engines}"
            f"{''.join(f'; {cell.reason}' for cell in not_there if cell.verdict == 'failed')}",
            expected=(
                "at least one exported model, because a check that compares nothing must not pass"
            ),
            fix="Run mtl-export merge --all-tasks or mtl-export onnx --all-tasks first",
        )
    drop = request.max_drop
    return artefacts if drop is None else with_max_drop(artefacts, drop)
