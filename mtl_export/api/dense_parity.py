"""Parity of dense tasks: what was exported, at which size of image, and golden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.api import artefacts as found_artefacts
from mtl_export.api import coverage
from mtl_export.api.accuracy import DEFAULT_MAX_DROP
from mtl_export.api.progress import Progress
from mtl_export.bundle.manifest import read_manifest
from mtl_export.dense.images import read_images
from mtl_export.dense.judge import DenseJudge, ImageCase, seeded_cases
from mtl_export.dense.runner import DenseRunner
from mtl_export.errors import IntegrityError, UsageError
from mtl_export.names import IMAGE

if TYPE_CHECKING:
    from mtl_export.api.artefacts import Places
    from mtl_export.api.parity import ParityRequest
    from mtl_export.dense.model import DenseModel
    from mtl_export.parity.artefact import Artefact
    from mtl_export.parity.report import Cell, ParityReport


def artefacts_of(
    model: DenseModel, places: Places, threads: int
) -> tuple[list[Artefact], list[Cell]]:
    """Return what was exported, and a cell for each export that cannot be compared."""
    found, not_there = found_artefacts.artefacts_of(
        model.tasks, places, DenseRunner, threads=threads
    )
    return found, not_there + coverage.unclaimed_cells(places, model.tasks)


def judged(
    model: DenseModel,
    artefacts: Sequence[Artefact],
    not_there: Sequence[Cell],
    request: ParityRequest,
    progress: Progress,
) -> tuple[ParityReport, tuple[Path, ...]]:
    """Return the verdict, and the files of golden vectors where those were asked for.

    Exports of another size of image are compared at that size.

    Raises:
        UsageError: An option says nothing here.
        CalibrationError: ``inputs`` holds no images of that size.
    """
    from mtl_export.api.evidence import with_evidence
    from mtl_export.runtime.runners.pytorch import use_threads

    if request.bisect:
        raise UsageError(
            "--bisect: a model of dense tasks",
            expected="a graph in half precision, which dense tasks have none of",
            fix="Leave out --bisect",
        )
    if request.scores:
        raise UsageError(
            "--score: a model of dense tasks",
            expected="none, because each kind of map has its own: miou, maxf, odsf, angle, rmse",
            fix="Leave out --score",
        )
    use_threads(request.threads)
    by_size: dict[int, list[Artefact]] = {}
    for one in artefacts:
        by_size.setdefault(image_size_of(one, model), []).append(one)
    reports: list[ParityReport] = []
    cases: list[ImageCase] = []
    for size, own in by_size.items():
        cases = cases_of(request, size)
        judge = DenseJudge(model.at(size), own, cases, request.tolerance, progress.begin)
        progress.expect(judge.steps)
        own_report = judge.report(localise=request.localise)
        if request.dataset is not None:
            images, labels = read_images(request.dataset, size)
            allowed = DEFAULT_MAX_DROP if request.max_drop is None else request.max_drop
            progress.expect(1 + len(own))
            scores = judge.accuracy(images, labels, allowed / 100)
            own_report = replace(own_report, accuracy=scores)
        reports.append(own_report)
    report = replace(
        reports[0],
        cells=tuple(cell for one in reports for cell in one.cells) + tuple(not_there),
        localised=tuple(found for one in reports for found in one.localised),
        quantised=tuple(found for one in reports for found in one.quantised),
        accuracy=tuple(cell for one in reports for cell in one.accuracy),
    )
    golden = save_golden(model, artefacts, report, request) if request.golden else []
    for path in golden:
        progress.note(f"golden vectors: {path}")
    return with_evidence(report, artefacts, cases, request.inputs), tuple(golden)


def image_size_of(artefact: Artefact, model: DenseModel) -> int:
    """Return the side of the images that an export takes, as its folder says."""
    folder = artefact.path if artefact.path and artefact.path.is_dir() else None
    folder = folder or (artefact.path.parent if artefact.path else None)
    try:
        manifest = read_manifest(folder) if folder else None
    except IntegrityError:
        manifest = None
    size = manifest.recipe.options.get("image_size") if manifest else None
    return size if isinstance(size, int) else model.described.image_size


def cases_of(request: ParityRequest, size: int) -> list[ImageCase]:
    """Return the batches to compare on: the user's images, or seeded ones.

    Raises:
        CalibrationError: The file holds no images.
    """
    if request.inputs is None:
        return seeded_cases(size, request.preset)
    images, _ = read_images(str(request.inputs), size)
    return [ImageCase(f"batch of {len(images)} from {request.inputs.name}", images)]


def save_golden(
    model: DenseModel,
    artefacts: Sequence[Artefact],
    report: ParityReport,
    request: ParityRequest,
) -> list[Path]:
    """Save the answer to one image beside every graph and engine that passed."""
    from mtl_export.api.golden import verdicts_of, write_golden
    from mtl_export.runtime.golden import Vector

    saved = []
    for artefact in artefacts:
        path = artefact.path
        is_judged = path is not None and path.suffix in {".onnx", ".engine"}
        verdicts = verdicts_of(report, artefact)
        if path is None or not is_judged or artefact.quantised or verdicts - {"passed"}:
            continue
        size = image_size_of(artefact, model)
        inputs = {IMAGE: seeded_cases(size, "quick")[0].image[:1]}
        floors = report.noise_floors[artefact.dtype]
        with artefact.runner as runner:
            outputs = runner.infer(inputs)
        vectors = []
        for task, values in outputs.items():
            atol = request.tolerance.factor * floors[task]
            vector = Vector(task, path.name, inputs, {task: values}, atol, 0.0)
            vectors += [] if vector.vacuity else [vector]
        if vectors:
            saved.append(write_golden(path.parent, vectors))
    return saved
