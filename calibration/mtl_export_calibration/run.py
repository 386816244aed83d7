"""Exported graphs and rows -> quantised graphs in their folders, or why one is not written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mtl_export.api import dense, graphs, sources
from mtl_export.api.progress import SILENT, Progress
from mtl_export.api.settings import Settings
from mtl_export.api.written import Written
from mtl_export.errors import UsageError
from mtl_export.names import LAYOUTS, PER_TASK, SINGLE_GRAPH
from mtl_export_calibration.report import Outcome
from mtl_export_calibration.targets import (
    BOTH,
    nothing_exported,
    refuse_form,
    refuse_parts,
    refuse_stale,
    targets_of,
)

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.data.samples import Samples
    from mtl_export_calibration.measure import ExportedGraph, Options, Work
    from mtl_export_calibration.report import GraphRanges, GraphReport


class _GateError(Exception):
    """Ends the block of an output folder, so that a graph that fails is not written."""

    def __init__(self, report: GraphReport) -> None:
        super().__init__()
        self.report = report


@dataclass(frozen=True)
class Given:
    """The data, read.

    Attributes:
        calibration: Rows to take ranges from.
        judged: Rows to count accuracy on.
        rows: How many of each, by task: what reports say.
        longest: Tokens at which texts were cut.
    """

    calibration: Samples
    judged: Samples
    rows: dict[str, Any]
    longest: int


@dataclass(frozen=True)
class CalibrationRequest:
    """What was asked for.

    Attributes:
        settings: Shared options.
        options: How to quantise.
        data: Rows to take ranges from.
        judge: Rows to count accuracy on.
        samples: Rows of each task to take ranges from.
        seed: Decides which.
        progress: Hears of the steps.
    """

    settings: Settings
    options: Options
    data: str
    judge: str
    samples: int
    seed: int
    progress: Progress = SILENT

    def quantised(self, layout: str, onnx: Path | None) -> list[Outcome]:
        """Quantise every graph; see ``calibrate``.

        Args:
            layout: One of ``LAYOUTS``, or ``BOTH``.
            onnx: Holds the graphs; None for the output folder's, exported where missing.
        """
        from mtl_export.checkpoint.checkpoint import task_named

        swin = dense.opened(self.settings)
        if swin is not None:
            from mtl_export_calibration.dense import quantised

            return quantised(swin, self, layout, onnx)
        self.refuse_unknown()
        bound = sources.open_bound(self.settings)
        refuse_parts(bound, layout)
        for name in self.options.weights:
            task_named(bound.adapters.tasks, name)
        given = self.read(bound)  # before graphs are exported for nothing
        return self.run(bound, self.graphs(bound, layout, onnx), given)

    def refuse_unknown(self) -> None:
        """Refuse a call without data, or an engine that is not there or cannot do it.

        Raises:
            UsageError: There are no data, or the engine has no such ranges.
            BackendMissingError: The engine is not installed.
        """
        from mtl_export_calibration.engines import engine_named, refuse_combination

        if not self.data:
            raise UsageError(
                "--data: no calibration data was given",
                expected=(
                    "rows of every task: JSONL, a folder, npz, or module:function, because ranges "
                    "are taken from them"
                ),
                fix="Pass --data, or set data in the [calibrate] section of mtl-export.toml",
            )
        chosen = self.options
        refuse_combination(chosen.engine, chosen.combine)
        engine_named(chosen.engine, chosen.method, chosen.number)

    def graphs(
        self, bound: BoundModel, layout: str, folder: Path | None
    ) -> list[list[ExportedGraph]]:
        """Return the graphs to quantise, those of one layout together.

        Args:
            bound: The model.
            layout: One of ``LAYOUTS``, or ``BOTH``.
            folder: Holds them; None for the output folder's, where what is missing is exported.

        Raises:
            UsageError: There is none, or one of another checkpoint or base, or without logits,
                or one that takes one task for the whole batch.
        """
        parent = folder or self.settings.output_dir / "onnx"
        layouts = LAYOUTS if layout == BOTH else (layout,)
        groups = [targets_of(bound, parent, one) for one in layouts]
        refuse_stale(bound, [target for group in groups for target in group])
        if folder is None:
            self._export(bound, parent, [target for group in groups for target in group])
        found = [[target for target in group if target.path.is_file()] for group in groups]
        for target in (target for group in found for target in group):
            refuse_form(target)
        if not any(found):
            raise nothing_exported(parent, layout)
        return [group for group in found if group]

    def _export(self, bound: BoundModel, parent: Path, targets: Sequence[ExportedGraph]) -> None:
        """Export the graphs that are not there."""
        missing = [target for target in targets if not target.path.is_file()]
        if not missing:
            return
        exporter = graphs.Exporter(bound, parent)
        self.progress.expect(len(missing))
        for target in missing:
            layout = PER_TASK if target.task else SINGLE_GRAPH
            graph = graphs.Graph(target.tasks(bound.adapters.tasks), layout)
            written = exporter.write(graph, self.progress, force=self.settings.force)
            self.progress.note(f"ONNX {written.path}: {written.status}.")

    def read(self, bound: BoundModel) -> Given:
        """Return the rows to take ranges from, and those to count accuracy on.

        Raises:
            CalibrationError: The data cannot be used, or a task has none.
        """
        from mtl_export.checkpoint.model_inputs import longest_sequence
        from mtl_export.data.model_arrays import model_arrays
        from mtl_export.data.samples import open_samples

        tasks, folder = bound.adapters.tasks, bound.base.folder
        longest = longest_sequence(bound.base.config, unlimited=512)
        calibration, counts = open_samples(
            self.data, tasks, folder, max_length=longest, per_task=self.samples, seed=self.seed
        )
        judged, judged_counts = open_samples(
            self.judge, tasks, folder, max_length=longest, per_task=None, seed=self.seed
        )
        calibration, judged = (
            replace(rows, arrays=model_arrays(rows.arrays, bound.base.config, f"{flag} {given}"))
            for rows, flag, given in (
                (calibration, "--data", self.data),
                (judged, "--judge", self.judge),
            )
        )
        for name, count in counts.items():
            repeated = f", fed {count.fed} times" if count.fed > count.used else ""
            self.progress.detail(f"{name}: {count.used} of {count.available} rows{repeated}")
        rows = {
            task.name: {
                "available": counts[task.name].available,
                "used": counts[task.name].used,
                "judged": judged_counts[task.name].used,
            }
            for task in tasks
        }
        return Given(calibration, judged, rows, longest)

    def run(
        self, bound: BoundModel, groups: Sequence[Sequence[ExportedGraph]], given: Given
    ) -> list[Outcome]:
        """Quantise graphs, those of one layout together."""
        from mtl_export_calibration.cache import open_cache
        from mtl_export_calibration.measure import Work, measure

        outcomes = []
        for group in groups:
            self.progress.expect(1)
            with open_cache(self.settings.output_dir / "calibration") as cache:
                work = Work(
                    bound=bound,
                    targets=tuple(group),
                    calibration=given.calibration,
                    judged=given.judged,
                    options=self.options,
                    cache=cache,
                    progress=_Meter(self.progress),
                    longest=given.longest,
                )
                measured = measure(work)
                outcomes += [
                    self._graph(work, one, measured[one.name], given.rows) for one in group
                ]
        return outcomes

    def _graph(
        self, work: Work, target: ExportedGraph, measured: GraphRanges, rows: dict[str, Any]
    ) -> Outcome:
        from mtl_export.bundle.output import output_folder
        from mtl_export_calibration.job import GraphJob

        started = perf_counter()
        parent = self.settings.folder(f"onnx-{self.options.number.name}")
        place = parent / target.task.name if target.task else parent
        names = [task.name for task in target.tasks(work.bound.adapters.tasks)]
        size = sum(file.stat().st_size for file in target.folder.iterdir() if file.is_file())
        try:
            with ExitStack() as stack:
                plan = stack.enter_context(
                    output_folder(
                        place,
                        recipe=self._recipe(work, target),
                        force=self.settings.force,
                        estimated_size_bytes=size,
                    )
                )
                job = GraphJob(work, target, measured, rows, plan.folder)
                report = job.report_again() if plan.up_to_date else job.run()
                if not report.passed:
                    raise _GateError(report)
                report = job.timed(report)
        except _GateError as failure:
            return Outcome(failure.report, None)
        return Outcome(report, Written.from_plan(plan, names, perf_counter() - started))

    def _recipe(self, work: Work, target: ExportedGraph) -> Recipe:
        key, chosen = work.key(target), self.options
        recipe = sources.recipe(
            "calibrate",
            work.bound,
            {
                "served": [task.name for task in target.tasks(work.bound.adapters.tasks)],
                "quantize": chosen.number.name,
                "method": chosen.method,
                "engine": chosen.engine,
                "combine": work.combine,
                "weights": {name: str(value) for name, value in chosen.weights.items()},
                "exclude": list(chosen.exclude),
                "deltas": chosen.deltas,
                "max_drop": chosen.max_drop,
                "max_cut": chosen.max_cut,
                "max_excluded": chosen.max_excluded,
                "versions": key["versions"],
            },
        )
        data = {"data_sha256": key["data_sha256"], "judged_sha256": key["judged_sha256"]}
        graphs = {
            f"onnx_sha256 {graph}/{file}": digest
            for graph, files in key["onnx_sha256"].items()
            for file, digest in files.items()
        }
        return replace(recipe, sources={**recipe.sources, **data, **graphs})


class _Meter:
    """Tells a progress of parts of the work as steps."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._name = progress, ""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Say how much of the part ``name`` is done."""
        if name != self._name:
            self._name = name
            self._progress.at(name, 0, 1)
        self._progress.within(done, total)
