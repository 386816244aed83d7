"""``mtl-export calibrate``: exported graphs, quantised with ranges that respect tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from mtl_export.errors import MtlExportError, UsageError
from mtl_export_cli import graphs, options, render, sources
from mtl_export_cli.calibrated import Outcome, print_outcomes
from mtl_export_cli.options import Settings, option, with_settings
from mtl_export_cli.written import Written

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.bundle.manifest import Recipe
    from mtl_export_calibration.measure import Options, Target, Work
    from mtl_export_calibration.report import GraphReport, Measured

EXIT_FAILED = 4
FORMATS = ("int8", "fp8", "int4")
METHODS = ("max", "percentile", "entropy", "mse")
COMBINATIONS = ("union", "weighted", "per-task")
DELTAS = ("apart", "exclude", "merged")
EPILOG = """\b
Example:
  mtl-export calibrate
  mtl-export calibrate --quantize fp8 --layout per-task
  mtl-export calibrate --data rows.jsonl --judge labelled.jsonl --exclude 'layer\\.0\\.'
\b
Data: rows.jsonl, a folder of them, arrays.npz, or module:function (file.py:function).
"""


def _weights(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    """Return ``NAME=NUMBER`` options as a mapping."""
    weights = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER") from None
        if not weights[name] >= 0.0:
            raise click.BadParameter(f"{value!r}: a weight is not negative")
    return weights


@click.command(short_help="Quantise exported graphs, by calibration data.", epilog=EPILOG)
@with_settings(
    options.SOURCE, [options.LAYOUT], [options.OUTPUT[0], options.OUTPUT[2]], options.TALK
)
@option("--data", metavar="DATA", help="Rows to take ranges from; each task needs some.")
@option("--judge", metavar="DATA",
        help="Rows to count accuracy on, best labelled; by default those of --data.")  # fmt: skip
@option("--samples", type=click.IntRange(min=1), default=128, show_default=True,
        help="Rows of each task to take ranges from.")  # fmt: skip
@option("--seed", type=int, default=0, show_default=True, help="Decides which rows.")
@option("--quantize", type=click.Choice(FORMATS), default="int8", show_default=True,
        help="int4: weights only.")  # fmt: skip
@option("--method", type=click.Choice(METHODS),
        help="How ranges are chosen; by default percentile for int8, max for fp8.")  # fmt: skip
@option("--combine", type=click.Choice(COMBINATIONS),
        help="How to join tasks' ranges; by default union, merged graphs: per-task.")  # fmt: skip
@option("--weight", multiple=True, metavar="TASK=NUMBER", callback=_weights,
        help="A task's weight for --combine weighted; 1 unless given.")  # fmt: skip
@option("--exclude", multiple=True, metavar="REGEX", help="Layers to leave unquantised.")
@option("--deltas", type=click.Choice(DELTAS), default="apart", show_default=True,
        help="Layers of merged graphs whose steps would swallow the task's change.")  # fmt: skip
@option("--max-drop", type=click.FloatRange(min=0.0),
        help="Points the worst task may lose; by default 1, fp8 0.5.")  # fmt: skip
@option("--max-excluded", type=click.FloatRange(0.0, 1.0), default=0.5, show_default=True,
        help="Largest share of layers that may be left unquantised to get there.")  # fmt: skip
@option("--onnx", type=click.Path(path_type=Path), metavar="DIR", help="ONNX graphs.")
@option("--threads", type=click.IntRange(min=0), default=0, help="Threads; 0: all cores.")
def command(
    settings: Settings,
    *,
    layout: str | None,
    data: str | None,
    judge: str | None,
    samples: int,
    seed: int,
    quantize: str,
    method: str | None,
    combine: str | None,
    weight: dict[str, float],
    exclude: tuple[str, ...],
    deltas: str,
    max_drop: float | None,
    max_excluded: float,
    onnx: Path | None,
    threads: int,
) -> int:
    """Quantise exported graphs, by calibration data.

    Takes ranges of every activation on every task, writes explicit Q/DQ around the base's
    products, and counts what that costs each task. Where the worst task loses more than
    --max-drop, the layers that cost most are left unquantised. Graphs that pass go to
    onnx-int8/ (onnx-fp8/, onnx-int4/) under the output folder, or to --output; if a task
    still loses too much nothing is written and the exit code is 4. Without --layout all
    graphs that were exported are taken.
    """
    from mtl_export_calibration.formats import format_named
    from mtl_export_calibration.measure import Options

    number = format_named(quantize)
    chosen = Options(
        number=number,
        method=method or number.method,
        combine=combine,
        weights=weight,
        exclude=exclude,
        deltas=deltas,
        max_drop=number.max_drop if max_drop is None else max_drop,
        max_excluded=max_excluded,
        threads=threads,
    )
    request = _Request(settings, chosen, data or "", judge or data or "", samples, seed)
    request.refuse_unknown()
    bound = sources.open_bound(settings)
    _refuse_unknown_weights(bound, weight)
    parent = onnx or settings.output_dir / "onnx"
    groups = [_targets(bound, parent, one) for one in ([layout] if layout else options.LAYOUTS)]
    if not any(groups):
        raise _nothing_exported(parent, layout)
    outcomes = request.run(bound, [group for group in groups if group])
    print_outcomes(outcomes, chosen, as_json=settings.json)
    return 0 if all(outcome.report.passed for outcome in outcomes) else EXIT_FAILED


class _GateError(Exception):
    """Ends the block of an output folder, so that a graph that fails is not written."""

    def __init__(self, report: GraphReport) -> None:
        super().__init__()
        self.report = report


@dataclass(frozen=True)
class _Request:
    """What was asked for.

    Attributes:
        settings: Shared options.
        options: How to quantise.
        data: Rows to take ranges from.
        judge: Rows to count accuracy on.
        samples: Rows of each task to take ranges from.
        seed: Decides which.
    """

    settings: Settings
    options: Options
    data: str
    judge: str
    samples: int
    seed: int

    def refuse_unknown(self) -> None:
        """Refuse a call without data."""
        if not self.data:
            raise UsageError(
                where="--data",
                found="no calibration data was given",
                expected="rows of every task: JSONL, a folder, npz, or module:function",
                why="ranges are taken from them",
                fix="Pass --data, or set data in the [calibrate] section of mtl-export.toml",
            )

    def run(self, bound: BoundModel, groups: Sequence[Sequence[Target]]) -> list[Outcome]:
        """Quantise graphs, those of one layout together."""
        from mtl_export_calibration.measure import Work, measure
        from mtl_export_calibration.samples import open_samples

        tasks, folder = bound.adapters.tasks, bound.base.folder
        longest = int(bound.base.config.get("max_position_embeddings") or 512)
        talk = render.Talk.from_settings(self.settings)
        calibration, counts = open_samples(
            self.data, tasks, folder, max_length=longest, per_task=self.samples, seed=self.seed
        )
        judged, judged_counts = open_samples(
            self.judge, tasks, folder, max_length=longest, per_task=None, seed=self.seed
        )
        for name, count in counts.items():
            repeated = f", fed {count.fed} times" if count.fed > count.used else ""
            talk.detail(f"{name}: {count.used} of {count.available} rows{repeated}")
        rows = {
            task.name: {
                "available": counts[task.name].available,
                "used": counts[task.name].used,
                "judged": judged_counts[task.name].used,
            }
            for task in tasks
        }
        outcomes = []
        for group in groups:
            with talk.steps(1) as steps:
                meter = _Meter(steps)
                work = Work(
                    bound=bound,
                    targets=tuple(group),
                    calibration=calibration,
                    judged=judged,
                    options=self.options,
                    cache=self.settings.output_dir / "calibration",
                    progress=meter,
                    longest=longest,
                )
                measured = measure(work)
                outcomes += [self._graph(work, one, measured[one.name], rows) for one in group]
        return outcomes

    def _graph(
        self, work: Work, target: Target, measured: Measured, rows: dict[str, Any]
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

    def _recipe(self, work: Work, target: Target) -> Recipe:
        key, chosen = work.key(target), self.options
        recipe = sources.recipe(
            "calibrate",
            work.bound,
            {
                "served": [task.name for task in target.tasks(work.bound.adapters.tasks)],
                "quantize": chosen.number.name,
                "method": chosen.method,
                "combine": work.combine,
                "weights": {name: str(value) for name, value in chosen.weights.items()},
                "exclude": list(chosen.exclude),
                "deltas": chosen.deltas,
                "max_drop": chosen.max_drop,
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
    """Shows parts of the work as steps."""

    def __init__(self, steps: render.Steps) -> None:
        self._steps, self._name = steps, ""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Say how much of the part ``name`` is done."""
        if name != self._name:
            self._name = name
            self._steps.at(name, 0, 1)
        self._steps.within(done, total)


def _targets(bound: BoundModel, parent: Path, layout: str) -> list[Target]:
    """Return the graphs of one layout that were exported."""
    from mtl_export_calibration.measure import Target

    one = Target(parent, None)
    if layout == graphs.SINGLE_GRAPH:
        return [one] if one.path.is_file() and _serves_rows(one.path) else []
    found = [Target(parent / task.name, task) for task in bound.adapters.tasks]
    return [target for target in found if target.path.is_file()]


def _serves_rows(path: Path) -> bool:
    """Return whether each row of a batch picks its own task.

    Raises:
        UsageError: The graph takes one task for the whole batch.
    """
    from mtl_export.runtime.ort import onnx_metadata

    if onnx_metadata(path).get("mtl_export.task_input") == "scalar":
        raise UsageError(
            where=str(path),
            found="it takes one task for the whole batch",
            expected="a graph in which each row picks its task",
            why="tasks are mixed in the batches that it is judged on",
            fix="Export it with --task-input rows, or pass --layout per-task",
        )
    return True


def _nothing_exported(parent: Path, layout: str | None) -> MtlExportError:
    parts = [name for name in ("prefill", "encoder") if (parent / f"{name}.onnx").is_file()]
    if parts:
        return UsageError(
            where=str(parent),
            found=f"a model that runs as several graphs ({parts[0]}.onnx and more)",
            expected="one model.onnx",
            why="accuracy is counted on its logits",
            fix="Quantise it with a tool for language models",
        )
    command = "mtl-export onnx --all-tasks"
    if layout == graphs.PER_TASK:
        command += " --layout per-task"
    return UsageError(
        where=str(parent),
        found="no exported graph",
        expected="model.onnx, or TASK/model.onnx",
        why="it is the exported graph that is quantised",
        fix=f"Run {command} first",
    )


def _refuse_unknown_weights(bound: BoundModel, weights: dict[str, float]) -> None:
    from mtl_export.checkpoint.checkpoint import task_named

    for name in weights:
        task_named(bound.adapters.tasks, name)
