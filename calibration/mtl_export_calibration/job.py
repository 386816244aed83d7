"""One exported graph -> its quantised bundle, if every task stays accurate enough.

    measure ranges -> try all layers -> where a task loses too much, search the smallest
    set of layers to leave out -> write, or refuse

No set of layers is searched for where a task's values are cut: its ranges are wrong.

A trial writes the graph and counts its decisions on the rows that are judged. Trials are
kept, so that a killed search goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mtl_export.bundle.manifest import own_files
from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import CalibrationError, GraphError, shortened
from mtl_export.graph.opened import open_graph
from mtl_export.graph.passes.split_gemm import SplitGemmPass
from mtl_export.names import MODEL_FILE, QUANTISATION_KEY
from mtl_export.parity.accuracy.scores import Answers
from mtl_export.runtime.golden import GOLDEN_FILE
from mtl_export_calibration.cache import read_cache, versions, write_cache
from mtl_export_calibration.deltas import APART, MERGED, DeltaSource, swallowed_layers
from mtl_export_calibration.evaluate import (
    LATENCY_LENGTH,
    SCORE,
    TaskScore,
    answers,
    latencies_ms,
    score,
)
from mtl_export_calibration.half import HALF, half_precision
from mtl_export_calibration.measure import ExportedGraph, Work, layers_of
from mtl_export_calibration.mixed import Search, smallest_exclusion, worst_first
from mtl_export_calibration.qdq import QuantisationPlan, quantise
from mtl_export_calibration.ranges import Cut
from mtl_export_calibration.report import FILE, GraphRanges, GraphReport

_KEPT: Shape = {
    "tasks": {str: SCORE},
    "half?": {str: SCORE},
    "excluded": [str],
    "gate": {"worst_drop": float, "trials": int},
}
GRAPH_FILES = (MODEL_FILE, f"{MODEL_FILE}.data")


class GraphJob:
    """The work on one graph.

    Args:
        work: All that is needed.
        target: The graph.
        measured: What the data say of it.
        counts: Rows of each task, for the report.
        folder: Where trials are written; holds the chosen graph at the end.
    """

    def __init__(
        self,
        work: Work,
        target: ExportedGraph,
        measured: GraphRanges,
        counts: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._work, self._target, self._measured = work, target, measured
        self._counts, self._folder = counts, folder
        self._layers, self._notes = layers_of(work, target, open_graph(target.path))
        self._tasks = target.tasks(work.bound.adapters.tasks)
        self._judged = work.judged.of_task(target.task.index) if target.task else work.judged
        self._key = {**work.key(target), "deltas": work.options.deltas}
        self._log = work.cache_file(target, "trials")
        kept = read_cache(self._log, self._key, {"trials?": {str: [SCORE]}}) or {}
        self._trials: dict[str, list[dict[str, Any]]] = kept.get("trials") or {}
        self._reference: dict[int, Answers] | None = None
        self._written: frozenset[str] | None = None

    def run(self) -> GraphReport:
        """Quantise, search where needed, and return the verdict.

        The graph and its report lie in the folder if the verdict is passed.

        Raises:
            CalibrationError: ``--deltas exclude`` leaves no layer.
        """
        options = self._work.options
        always = self._always_excluded()
        order = [n for n in worst_first(self._measured.sqnr_db) if n not in always]
        if not order:
            raise CalibrationError(
                f"{self._target.name}: every layer's steps are larger than what the task changes",
                expected="at least one layer to quantise",
                fix="Pass --deltas apart: the base is quantised, the change is added in float",
            )
        # Leaving everything out would pass and be no quantised graph.
        limit = min(int(options.max_excluded * len(self._layers)), len(order) - 1)
        cuts = [self._measured.cut.get(task.name, Cut()) for task in self._tasks]
        search = smallest_exclusion(
            order,
            lambda excluded: self._drop(excluded | always),
            max_drop=options.max_drop,
            max_excluded=max(0, limit) if all(c.passes(options.max_cut) for c in cuts) else 0,
        )
        excluded = search.excluded | always
        scores = [TaskScore(**one) for one in self._scores(excluded)]
        report = self._report(search, excluded, scores)
        if report.passed:
            report = replace(report, half=tuple(TaskScore(**one) for one in self._half()))
            self._write(excluded)
            self._finish(report)
        return report

    def report_again(self) -> GraphReport:
        """Return the verdict on the graph that lies in the folder already."""
        kept = read_json(self._folder / FILE, _KEPT, fix="Run calibrate again with --force")
        lacking = [task.name for task in self._tasks if task.name not in kept["tasks"]]
        if lacking:
            raise CalibrationError(
                f"{self._folder / FILE}: nothing on {shortened(lacking)}",
                expected="every task of the graph",
                fix="Run calibrate again with --force",
            )
        scores = [
            TaskScore(**{name: kept["tasks"][task.name][name] for name in SCORE})
            for task in self._tasks
        ]
        search = Search(
            frozenset(kept["excluded"]), kept["gate"]["worst_drop"], True, kept["gate"]["trials"]
        )
        half = tuple(
            TaskScore(**{name: one[name] for name in SCORE})
            for one in (kept.get("half") or {}).values()
        )
        return replace(self._report(search, search.excluded, scores), half=half)

    def timed(self, report: GraphReport) -> GraphReport:
        """Return the report with the latencies of the float graph and of those in its place.

        They are kept for ``read_latencies``; the same files are not timed again.
        """
        work, number = self._work, self._work.options.number.name
        length = min(LATENCY_LENGTH, work.longest)
        files = {name: sha256_of_file(self._folder / name) for name in GRAPH_FILES}
        key: dict[str, Any] = {
            "files": files,
            "length": length,
            "threads": work.options.threads,
            **versions(),
        }
        file = work.cache_file(self._target, "latency")
        kept = read_cache(file, key, {"latency_ms": {str: float}})
        if kept is None:
            with ExitStack() as stack:
                paths = {"fp32": self._target.path, number: self._folder / MODEL_FILE}
                if report.half:
                    half = stack.enter_context(half_precision(self._target.path, work.cache))
                    paths = {"fp32": paths["fp32"], HALF: half, number: paths[number]}
                threads = work.options.threads
                times = latencies_ms(
                    [*paths.values()], self._judged, length=length, threads=threads
                )
            kept = {"latency_ms": dict(zip(paths, times, strict=True))}
            write_cache(file, key, kept)
        times_ms = {name: float(kept["latency_ms"][name]) for name in ("fp32", HALF, number)
                    if name in kept["latency_ms"]}  # fmt: skip
        return replace(report, latency_ms=times_ms, latency_length=length)

    def _swallowed(self) -> frozenset[str]:
        if self._target.task is None:
            return frozenset()
        shares = {name: dict(by_task) for name, by_task in self._measured.swallowed.items()}
        return frozenset(swallowed_layers(shares, [self._target.task.name]))

    def _always_excluded(self) -> frozenset[str]:
        keep = self._work.options.deltas in {APART, MERGED}
        return frozenset() if keep else self._swallowed()

    def _apart(self) -> frozenset[str]:
        return self._swallowed() if self._work.options.deltas == APART else frozenset()

    def _drop(self, excluded: frozenset[str]) -> float:
        return max(float(one["drop"]) for one in self._scores(excluded))

    def _scores(self, excluded: frozenset[str]) -> list[dict[str, Any]]:
        name = "\n".join(sorted(excluded))
        if name not in self._trials:
            self._write(excluded)
            self._trials[name] = [one.as_dict() for one in self._judge()]
            write_cache(self._log, self._key, {"trials": self._trials})
        return self._trials[name]

    def _judge(self) -> list[TaskScore]:
        candidate = self._answers(self._folder / MODEL_FILE, self._work.options.number.name)
        return self._against_float(candidate)

    def _half(self) -> list[dict[str, Any]]:
        """Return what half precision costs each task; nothing for a graph that has none."""
        if HALF not in self._trials:
            try:
                with half_precision(self._target.path, self._work.cache) as path:
                    scores = self._against_float(self._answers(path, HALF))
            except GraphError as error:
                self._notes.append(f"not compared with {HALF}: {error}")
                return []  # and not kept: a run that finds it would not know the note
            self._trials[HALF] = [one.as_dict() for one in scores]
            write_cache(self._log, self._key, {"trials": self._trials})
        return self._trials[HALF]

    def _against_float(self, candidate: dict[int, Answers]) -> list[TaskScore]:
        if self._reference is None:
            self._reference = self._answers(self._target.path, "float")
        return [
            score(self._reference[task.index], candidate[task.index], task) for task in self._tasks
        ]

    def _answers(self, path: Path, form: str) -> dict[int, Answers]:
        step = f"judge: {self._target.name}, {form}"
        return answers(
            path,
            self._judged,
            threads=self._work.options.threads,
            progress=lambda done, total: self._work.progress(step, done, total),
        )

    def _write(self, excluded: frozenset[str]) -> None:
        if self._written == excluded:
            return
        model = open_graph(self._target.path)
        SplitGemmPass()(model)
        number = self._work.options.number
        layers = [layer for layer in self._layers if layer.name not in excluded]
        measured = self._measured
        recipe = QuantisationPlan(
            number, layers, measured.amax, self._apart() - excluded, measured.rows
        )
        quantise(model, recipe, DeltaSource(self._work.bound, self._target.task))
        about = {
            "format": number.name,
            "method": self._work.options.method,
            "engine": self._work.options.engine,
            "combine": self._work.combine,
            "layers": len(layers),
            "excluded": sorted(excluded),
            "deltas_apart": sorted(recipe.apart),
            "data_sha256": self._key["data_sha256"],
        }
        model.metadata_props[QUANTISATION_KEY] = json.dumps(about)
        (self._folder / GRAPH_FILES[1]).unlink(missing_ok=True)
        ir.save(model, self._folder / MODEL_FILE, external_data=GRAPH_FILES[1])
        self._written = excluded

    def _finish(self, report: GraphReport) -> None:
        """Put the report, the config and the tokenizer beside the graph."""
        for file in own_files(self._target.folder):
            if ".onnx" in file.name or file.name == GOLDEN_FILE:
                continue  # golden vectors are the float graph's answers
            if file.parent == self._target.folder:
                shutil.copyfile(file, self._folder / file.name)
        text = json.dumps(
            report.as_dict(), indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False
        )
        (self._folder / FILE).write_text(text + "\n", encoding="utf-8")

    def _report(
        self, search: Search, excluded: frozenset[str], scores: Sequence[TaskScore]
    ) -> GraphReport:
        options = self._work.options
        return GraphReport(
            graph=self._target.name,
            number=options.number.name,
            method=options.method,
            engine=options.engine,
            combine=self._work.combine,
            measured=self._measured,
            scores=tuple(scores),
            excluded=tuple(sorted(excluded)),
            apart=tuple(sorted(self._apart() - excluded)),
            notes=tuple(self._notes),
            max_drop=options.max_drop,
            max_cut=options.max_cut,
            trials=search.trials,
            data={
                "calibration_sha256": self._key["data_sha256"],
                "judged_sha256": self._key["judged_sha256"],
                "rows": dict(self._counts),
            },
        )
