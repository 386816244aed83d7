"""Graphs and rows -> ranges, and what quantising each layer costs each task.

The single graph is run once for each task, a merged graph on its own task's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import Samples
from mtl_export.errors import CalibrationError, shortened
from mtl_export.graph.opened import open_graph
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from mtl_export.names import SINGLE_GRAPH
from mtl_export_calibration.cache import (
    read_arrays,
    read_cache,
    versions,
    write_arrays,
    write_cache,
)
from mtl_export_calibration.collect import KEPT_ROWS, TensorStatistics
from mtl_export_calibration.deltas import APART, DeltaSource
from mtl_export_calibration.engines import ONNXRUNTIME, PACKAGES, engine_named
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.layers import QuantLayer, find_layers
from mtl_export_calibration.ranges import CUT_FACTOR, PER_TASK, Cut, Ranges, combine, worst_cut
from mtl_export_calibration.report import MEASURED, GraphRanges
from mtl_export_calibration.sqnr import layer_sqnr_db
from mtl_export_calibration.weights import refusal, weight_grid

# Rows of each task, of those that accuracy is counted on, that the ranges are held against.
CUT_ROWS = 64
# Rows of all tasks together that int4 weights are rounded for.
ROUNDING_ROWS = 1024
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        number: The format.
        method: Calibrator of activations.
        combine: How tasks' ranges become one; None is ``union`` for the single graph and
            ``per-task`` for merged ones.
        weights: Task weights for ``weighted``.
        exclude: Regular expressions of layers to leave unquantised.
        deltas: What to do where a step swallows a task's change, one of ``DELTA_MODES``.
        max_drop: Points the worst task may lose.
        max_cut: Times as often as is usual that a task's values may lie beyond a range.
        max_excluded: Largest share of layers that may be left unquantised to reach that.
        threads: Threads of ONNX Runtime; 0 lets it decide.
        engine: Who measures activations and chooses ranges.
    """

    number: NumberFormat
    method: str
    combine: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    deltas: str = APART
    max_drop: float = 1.0
    max_cut: float = CUT_FACTOR
    max_excluded: float = 0.5
    threads: int = 0
    engine: str = ONNXRUNTIME


@dataclass(frozen=True)
class ExportedGraph:
    """One exported graph.

    Attributes:
        folder: Its folder.
        task: The task of a merged graph; None for the single graph.
    """

    folder: Path
    task: Task | None

    @property
    def path(self) -> Path:
        """Return its file."""
        return self.folder / "model.onnx"

    @property
    def name(self) -> str:
        """Return its name for people."""
        return self.task.name if self.task else "single graph"

    def tasks(self, tasks: Sequence[Task]) -> tuple[Task, ...]:
        """Return the tasks it serves."""
        return (self.task,) if self.task else tuple(tasks)

    def sha256(self) -> dict[str, str]:
        """Return the hash of every file that holds the graph, by name."""
        names = {self.path.name, *_data_files(self.path)}
        return {name: sha256_of_file(self.folder / name) for name in sorted(names)}


@dataclass(frozen=True)
class Work:
    """All that calibrating graphs of one layout needs.

    Attributes:
        bound: The adapter and its base.
        targets: The graphs: the single one, or merged ones.
        calibration: Rows that ranges are taken from.
        judged: Rows that accuracy is counted on.
        options: What the user chose.
        cache: Folder for results that cost time.
        progress: Is told what is done: name, part, of how many.
        longest: Most tokens that the model takes.
    """

    bound: BoundModel
    targets: tuple[ExportedGraph, ...]
    calibration: Samples
    judged: Samples
    options: Options
    cache: Path
    progress: Progress = lambda name, done, total: None
    longest: int = 512

    @property
    def combine(self) -> str:
        """Return how tasks' ranges become one."""
        merged = self.targets[0].task is not None
        return self.options.combine or (PER_TASK if merged else "union")

    @cached_property
    def _data_sha256(self) -> dict[str, str]:
        """Return the hashes of the rows."""
        return {
            "data_sha256": self.calibration.sha256(),
            "judged_sha256": self.judged.sha256(),
        }

    @cached_property
    def _onnx_sha256(self) -> dict[str, dict[str, str]]:
        """Return the hashes of all graphs' files, by the graphs' names."""
        return {one.name: one.sha256() for one in self.targets}

    def cache_file(self, target: ExportedGraph, kind: str) -> Path:
        """Return where a target's results of one kind are kept."""
        layout = f"task-{target.task.name}" if target.task else SINGLE_GRAPH
        return self.cache / f"{layout}.{self.options.number.name}.{kind}.json"

    def rows_file(self, target: ExportedGraph) -> Path:
        """Return where rows that a target's weights are rounded for are kept."""
        return self.cache_file(target, "rows").with_suffix(".npz")

    def key(self, target: ExportedGraph) -> dict[str, Any]:
        """Return everything that decides what is measured for ``target``."""
        options = self.options
        sources = [target] if self.combine == PER_TASK else self.targets
        return {
            "graph": target.name,
            **self._data_sha256,
            "onnx_sha256": {one.name: self._onnx_sha256[one.name] for one in sources},
            "checkpoint_sha256": self.bound.adapters.checkpoint_sha256,
            "format": options.number.name,
            "method": options.method,
            "combine": self.combine,
            "weights": dict(options.weights),
            "exclude": list(options.exclude),
            "engine": options.engine,
            "versions": versions(PACKAGES[options.engine]),
        }


def layers_of(
    work: Work, target: ExportedGraph, model: ir.Model
) -> tuple[list[QuantLayer], list[str]]:
    """Return the layers of a target that can be quantised, and why others cannot.

    Raises:
        CalibrationError: There is none.
    """
    options = work.options
    # The single graph computes base and low-rank part in one GEMM, which no format fits.
    SplitGemmPass()(model)
    found = find_layers(model, heads=work.bound.adapters.heads, exclude=options.exclude)
    reasons = {layer.name: refusal(layer, options.number) for layer in found}
    layers = [layer for layer in found if not reasons[layer.name]]
    if not layers:
        raise CalibrationError(
            f"{target.path}: no layer to quantise ({shortened(filter(None, reasons.values()), 1)})",
            expected="MatMul or Conv nodes with weights of the base",
            fix="Exclude less, or pass another format to --quantize",
        )
    return layers, [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def measure(work: Work) -> dict[str, GraphRanges]:
    """Return what the data say, by the targets' names; what is cached is not run again.

    Raises:
        CalibrationError: Ranges of all tasks are wanted and merged graphs are missing.
    """
    keys = {target.name: work.key(target) for target in work.targets}
    found = {}
    for target in work.targets:
        kept = read_cache(work.cache_file(target, "ranges"), keys[target.name], MEASURED)
        rows = _kept_rows(work, target, keys[target.name])
        if kept is not None and rows is not None:
            found[target.name] = GraphRanges.from_dict(kept, rows)
    if len(found) == len(work.targets):
        return found
    wanted = [target for target in work.targets if target.name not in found]
    _refuse_missing(work)
    sources = wanted if work.combine == PER_TASK else list(work.targets)
    statistics = {
        task.name: _collected(work, target, task, work.calibration.of_task(task.index), "calibrate")
        for target in sources
        for task in target.tasks(work.bound.adapters.tasks)
    }
    for target in wanted:
        found[target.name] = _measured(work, target, statistics)
        if found[target.name].rows:
            write_arrays(work.rows_file(target), keys[target.name], found[target.name].rows)
        path = work.cache_file(target, "ranges")
        write_cache(path, keys[target.name], found[target.name].as_dict())
    return found


def _kept_rows(
    work: Work, target: ExportedGraph, key: Mapping[str, Any]
) -> dict[str, Array] | None:
    """Return the rows that weights are rounded for, if any are; None where they are gone."""
    if work.options.number.quantises_activations:
        return {}
    return read_arrays(work.rows_file(target), key)


def _refuse_missing(work: Work) -> None:
    served = {t.name for target in work.targets for t in target.tasks(work.bound.adapters.tasks)}
    absent = [task.name for task in work.bound.adapters.tasks if task.name not in served]
    if absent and work.combine != PER_TASK:
        raise CalibrationError(
            f"--combine {work.combine}: no exported graph for {shortened(absent)}",
            expected="the graphs of all tasks, because the ranges of all of them are combined",
            fix="Run mtl-export onnx --all-tasks --layout per-task, or pass --combine per-task",
        )


def _collected(
    work: Work, target: ExportedGraph, task: Task, samples: Samples, step: str
) -> dict[str, TensorStatistics]:
    layers, _ = layers_of(work, target, open_graph(target.path))
    options = work.options
    engine = engine_named(options.engine, options.method, options.number)
    shared = -(-ROUNDING_ROWS // len(work.bound.adapters.tasks))
    wanted = 0 if options.number.quantises_activations else shared
    return engine(
        target.path,
        layers,
        samples,
        threads=options.threads,
        kept_rows=max(KEPT_ROWS, wanted),
        progress=lambda done, total: work.progress(
            f"{step}: {target.name}, {task.name}", done, total
        ),
    )


def _measured(
    work: Work, target: ExportedGraph, statistics: Mapping[str, Mapping[str, TensorStatistics]]
) -> GraphRanges:
    options, tasks = work.options, target.tasks(work.bound.adapters.tasks)
    names = [task.name for task in tasks]
    ranges = combine(
        statistics, options.number, options.method, work.combine, options.weights, names
    )
    model = open_graph(target.path)
    layers, _ = layers_of(work, target, model)
    deltas = DeltaSource(work.bound, target.task)
    rows: dict[str, Array] = {}
    if not options.number.quantises_activations:
        rows = {
            x: np.concatenate([part for name in names for part in statistics[name][x].rows])
            for x in {layer.x for layer in layers}
        }
    sqnr_db, swallowed = {}, {}
    for place, layer in enumerate(layers):
        weight = _weight(model, layer)
        grid = weight_grid(weight, layer, options.number, rows.get(layer.x))
        sqnr_db[layer.name] = {
            name: layer_sqnr_db(
                np.concatenate(statistics[name][layer.x].rows),
                weight,
                grid,
                layer,
                ranges.amax[layer.x],
            )
            for name in names
        }
        if shares := deltas.swallowed(layer, options.number, weight):
            swallowed[layer.name] = shares
        work.progress(f"sensitivity: {target.name}", place + 1, len(layers))
    own = {name: by_name for name, by_name in ranges.own.items() if name in names}
    if not options.number.quantises_activations:
        own = {}  # nobody pays for ranges that are not used
    cut = {task.name: _cut(work, target, task, ranges) for task in tasks}
    return GraphRanges(ranges.amax, own, sqnr_db, cut, swallowed, rows)


def _data_files(path: Path) -> set[str]:
    """Return the names of the files that hold the graph's external data."""
    model = open_graph(path)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {str(one.location) for one in tensors if isinstance(one, ir.ExternalTensor)}


def _weight(model: ir.Model, layer: QuantLayer) -> Array:
    constant = model.graph.initializers[layer.weight].const_value
    assert constant is not None
    values: Array = constant.numpy()
    return values


def _cut(work: Work, target: ExportedGraph, task: Task, ranges: Ranges) -> Cut:
    """Return where the ranges cut the task's judged rows most."""
    options = work.options
    if not options.number.quantises_activations:
        return Cut()
    own = work.judged.of_task(task.index)
    places = np.unique(np.linspace(0, len(own) - 1, min(CUT_ROWS, len(own))).astype(np.int64))
    seen = _collected(work, target, task, own.take(places), "check")
    return worst_cut(seen, ranges.amax, options.method, options.number)
