"""Graphs of dense tasks, quantised: Q/DQ around the trunk's products, the worst task gated.

Ranges come from images; low-rank streams, patch merging's convolutions per task and heads stay
float. Where a task loses too much, layers whose activations round worst are left unquantised, a
growing share of them, before the graph is given up.

    drop    points of the task's score where images are labelled; else: classes, probability: per
            cent of pixels that decide otherwise; directions: degrees between the two, on average;
            values: per cent of variance not shared
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from mtl_export.api import dense
from mtl_export.api.graph_form import Form
from mtl_export.api.graphs import Graph
from mtl_export.api.written import Written
from mtl_export.bundle.output import output_folder
from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.images import read_images
from mtl_export.dense.judge import decided
from mtl_export.dense.kinds import CLASSES, DIRECTIONS, PROBABILITY, kind_of
from mtl_export.dense.scores import score_of
from mtl_export.errors import UsageError
from mtl_export.graph.external_data import save_graph
from mtl_export.graph.opened import open_graph
from mtl_export.names import DENSE_KEY, IMAGE, MODEL_FILE, QUANTISATION_KEY
from mtl_export.parity.metrics import sqnr_db
from mtl_export.runtime.ort import load_onnxruntime, onnx_metadata, open_session
from mtl_export_calibration.calibrators import CALIBRATORS
from mtl_export_calibration.evaluate import TaskScore
from mtl_export_calibration.formats import INT4_BLOCK
from mtl_export_calibration.histogram import Histogram
from mtl_export_calibration.layers import QuantLayer, find_layers
from mtl_export_calibration.qdq import QuantisationPlan, quantise
from mtl_export_calibration.ranges import UNION
from mtl_export_calibration.report import FILE, GraphRanges, GraphReport, Outcome

if TYPE_CHECKING:
    from mtl_export.bundle.manifest import Recipe
    from mtl_export.dense.model import DenseModel
    from mtl_export_calibration.run import CalibrationRequest

# Shares of the layers that are left unquantised, one trial after the other.
TRIALS = (0.0, 0.125, 0.25, 0.5)
_OWN = (".shared_down", ".shared_up", ".task_down", ".task_up")


@dataclass(frozen=True)
class _Images:
    """Images, and labels beside them."""

    images: Array
    labels: Mapping[str, Array]

    @property
    def sha256(self) -> str:
        """Return one hash of all values."""
        digest = hashlib.sha256(self.images.tobytes())
        for name, value in sorted(self.labels.items()):
            digest.update(name.encode() + value.tobytes())
        return digest.hexdigest()


def quantised(
    model: DenseModel, request: CalibrationRequest, layout: str, onnx: Path | None
) -> list[Outcome]:
    """Quantise every graph of dense tasks; see ``front_door.calibrate``.

    Raises:
        UsageError: An option says nothing about images.
        CalibrationError: The data are no images of the model's size.
    """
    options = request.options
    if options.weights or options.deltas != "apart" or options.engine != "onnxruntime":
        raise UsageError(
            "--weight, --deltas or --engine: a model of dense tasks",
            expected="neither, because every image is every task's, and streams stay float anyway",
            fix="Leave it out",
        )
    request.refuse_unknown()
    size = model.described.image_size
    given = _Images(read_images(request.data, size)[0][: request.samples], {})
    judged = _Images(*read_images(request.judge, size))
    parent = onnx or request.settings.output_dir / "onnx"
    settings = replace(request.settings, all_tasks=True)
    wanted = dense.wanted_graphs(model, settings, layout)
    if onnx is None:
        exporter = dense.DenseExporter(model, parent, Form(), force=request.settings.force)
        exporter.write_missing(wanted, request.progress)
    found = [graph for graph in wanted if (graph.folder(parent) / MODEL_FILE).is_file()]
    for graph in found:
        path = graph.folder(parent) / MODEL_FILE
        about = parse_json(onnx_metadata(path)[DENSE_KEY], DENSE_KEY, {str: object})
        if about["postprocessed"]:
            raise UsageError(
                f"{path}: it ends in argmax, sigmoid or normalisation",
                expected="raw values, by which the noise of quantising is told",
                fix="Export it without --postprocess: mtl-export onnx --all-tasks --force",
            )
    request.progress.expect(len(found))
    return [_Job(model, request, graph, parent, given, judged).run() for graph in found]


class _FailedError(Exception):
    """Ends the block of an output folder, so that a graph that fails is not written."""


@dataclass(frozen=True)
class _Job:
    """One graph."""

    model: DenseModel
    request: CalibrationRequest
    graph: Graph
    parent: Path
    given: _Images
    judged: _Images

    def run(self) -> Outcome:
        """Quantise it, score it, and write it if it passes."""
        started, request = perf_counter(), self.request
        number = request.options.number.name
        request.progress.begin(f"calibrate: {self.graph.name}")
        source = self.graph.folder(self.parent)
        target = self.graph.folder(request.settings.folder(f"onnx-{number}"))
        report: GraphReport | None = None
        try:
            with output_folder(target, recipe=self._recipe(source), force=True) as plan:
                report = self._made(source, plan.folder)
                if not report.passed:
                    raise _FailedError
                text = json.dumps(report.as_dict(), indent=1, sort_keys=True)
                if not plan.up_to_date:
                    (plan.folder / FILE).write_text(text + "\n", encoding="utf-8")
        except _FailedError:
            assert report is not None
            return Outcome(report, None)
        names = [task.name for task in self.graph.tasks]
        return Outcome(report, Written.from_plan(plan, names, perf_counter() - started))

    def _recipe(self, source: Path) -> Recipe:
        options = self.request.options
        made = dense.recipe("calibrate", self.model, {
            "layout": self.graph.layout,
            "served": [task.name for task in self.graph.tasks],
            "quantize": options.number.name,
            "method": options.method,
            "exclude": list(options.exclude),
            "max_drop": options.max_drop,
            "max_excluded": options.max_excluded,
        })  # fmt: skip
        hashes = {
            "data_sha256": self.given.sha256,
            "judged_sha256": self.judged.sha256,
            "onnx_sha256": sha256_of_file(source / MODEL_FILE),
        }
        return replace(made, sources={**made.sources, **hashes})

    def _made(self, source: Path, folder: Path) -> GraphReport:
        """Write the quantised graph into ``folder``, the least float that passes."""
        options = self.request.options
        layers = trunk_layers(open_graph(source / MODEL_FILE), options.exclude)
        if not options.number.quantises_activations:
            # Blocks of a format without activations run along the inputs.
            layers = [one for one in layers if one.shape[0] % INT4_BLOCK == 0]
        if not layers:
            raise UsageError(
                f"--quantize {options.number.name}: no product of {source} can be quantised",
                expected=f"layers whose inputs come in blocks of {INT4_BLOCK}",
                fix="Pass --quantize int8",
            )
        statistics = _statistics(source / MODEL_FILE, layers, self.given.images, options.threads)
        choose = CALIBRATORS[options.method]
        amax = {name: choose(one, options.number) for name, one in statistics.items()}
        noise = {one.name: _noise_db(statistics[one.x], amax[one.x]) for one in layers}
        worst_first = sorted(layers, key=lambda layer: noise[layer.name])
        before = self._answers(source / MODEL_FILE)
        measured = GraphRanges(amax, {}, {name: {} for name in noise}, {}, {})
        report = None
        shares = [share for share in TRIALS if share <= options.max_excluded]
        for trial, share in enumerate(shares, start=1):
            left = {one.name for one in worst_first[: int(share * len(layers))]}
            chosen = [layer for layer in layers if layer.name not in left]
            self._write(source, folder, chosen, amax, left)
            after = self._answers(folder / MODEL_FILE)
            scores = tuple(self._score(task.name, before, after) for task in self.graph.tasks)
            report = GraphReport(
                self.graph.name, options.number.name, options.method, options.engine, UNION,
                measured, scores, tuple(sorted(left)), (), (), options.max_drop, trial,
                {"calibration_sha256": self.given.sha256, "images": len(self.given.images)},
            )  # fmt: skip
            if report.passed:
                break
        assert report is not None
        return report

    def _write(
        self,
        source: Path,
        folder: Path,
        layers: Sequence[QuantLayer],
        amax: Mapping[str, float],
        left: set[str],
    ) -> None:
        model = open_graph(source / MODEL_FILE)
        number = self.request.options.number
        quantise(model, QuantisationPlan(number, layers, amax))
        about = {
            "format": number.name,
            "method": self.request.options.method,
            "excluded": sorted(left),
            "data_sha256": self.given.sha256,
        }
        model.metadata_props[QUANTISATION_KEY] = json.dumps(about)
        save_graph(model, folder)
        config = (source / "config.json").read_bytes()
        (folder / "config.json").write_bytes(config)

    def _answers(self, path: Path) -> dict[str, Array]:
        session = open_session(path, threads=self.request.options.threads)
        names = [one.name for one in session.get_outputs()]
        rows = [session.run(names, {IMAGE: image[None]}) for image in self.judged.images]
        return {name: np.concatenate([row[at] for row in rows]) for at, name in enumerate(names)}

    def _score(
        self, task: str, before: Mapping[str, Array], after: Mapping[str, Array]
    ) -> TaskScore:
        """Return what quantising costs one task."""
        reference, candidate = before[task], after[task]
        count, score = len(reference), score_of(task)
        agreement, drop = _difference(task, reference, candidate)
        labels = self.judged.labels.get(task)
        float_score = own_score = None
        if labels is not None and score is not None:
            pairs = (zip(values, labels, strict=True) for values in (reference, candidate))
            sums = [np.stack([score.sums(raw, label) for raw, label in own]) for own in pairs]
            float_score, own_score = (score.total(one.sum(0)) for one in sums)
            drop = 100 * (float_score - own_score)
        noise = sqnr_db(reference, candidate)
        labelled = count if float_score is not None else 0
        return TaskScore(task, count, labelled, float_score, own_score, agreement, drop, noise)


def trunk_layers(model: ir.Model, exclude: Sequence[str]) -> list[QuantLayer]:
    """Return the products with a weight of the trunk, in graph order.

    Raises:
        UsageError: An expression of ``exclude`` is found in no layer's name.
    """
    maps = {
        id(value)
        for node in model.graph
        for value in node.outputs
        if (value.name or "").startswith("stage") and not (value.name or "").endswith(".shared")
    }
    of_maps = set()
    for node in model.graph:
        if any(id(value) in maps for value in node.outputs):
            step: ir.Node | None = node
            while step is not None and step.op_type != "MatMul":
                first = step.inputs[0]
                step = first.producer() if first is not None else None
            of_maps.add("" if step is None else step.name)
    found = find_layers(model, exclude=exclude)
    return [
        one
        for one in found
        if one.op_type == "MatMul" and one.node not in of_maps and not one.weight.endswith(_OWN)
    ]


def _statistics(
    path: Path, layers: Sequence[QuantLayer], images: Array, threads: int
) -> dict[str, Histogram]:
    """Return how often each layer's activation takes which magnitude."""
    onnxruntime = load_onnxruntime()
    model = open_graph(path)
    names = list(dict.fromkeys(layer.x for layer in layers))
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    ir.external_data.load_to_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = {name: Histogram() for name in names}
    for image in images:
        for name, value in zip(names, session.run(names, {IMAGE: image[None]}), strict=True):
            found[name].add(value)
    return found


def _noise_db(histogram: Histogram, amax: float) -> float:
    """Return the signal-to-noise ratio of rounding an activation to 8 bits within its range."""
    centers, counts = histogram.centers, histogram.counts
    step = max(amax, 1e-30) / 127
    error = np.where(centers > amax, (centers - amax) ** 2, step**2 / 12)
    noise, signal = float((counts * error).sum()), float((counts * centers**2).sum())
    return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def _difference(task: str, reference: Array, candidate: Array) -> tuple[float, float]:
    """Return the share of pixels that agree, and the points lost without labels."""
    kind = kind_of(task)
    if kind in {CLASSES, PROBABILITY}:
        counts = decided(task, reference, candidate, 0.0, is_final=False)
        share = counts.equal / counts.total
        return share, 100 * (1 - share)
    if kind == DIRECTIONS:
        lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
        cosine = (reference * candidate).sum(1) / np.maximum(lengths, 1e-12)
        degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        return float((degrees < 11.25).mean()), float(degrees.mean())
    spread = float(reference.var()) or 1.0
    lost = 100 * float(((reference - candidate) ** 2).mean()) / spread
    return 1 - min(1.0, lost / 100), lost
