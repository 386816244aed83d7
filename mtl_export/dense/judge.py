"""Parity of dense tasks: every export against the unmerged model in float64, map by map.

The noise floor of a task is the error of the same model in the export's dtype; an output passes
within 8 floors, as everywhere. Decisions are counted by pixel: the class, or the side of 0.5. One
batch has another size than the trace's, so that a baked-in batch shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.isolation import isolation_cells
from mtl_export.dense.kinds import CLASSES, PROBABILITY, kind_of, postprocessed
from mtl_export.dense.localise import localised
from mtl_export.dense.model import DenseModel
from mtl_export.dense.scores import judge_scores, refuse_misshaped, score_of
from mtl_export.errors import BackendMissingError, CalibrationError, MtlExportError, shortened
from mtl_export.names import IMAGE
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.checks.quantised import as_calibrated
from mtl_export.parity.metrics import Decisions, difference
from mtl_export.parity.report import AccuracyCell, Cell, ParityReport, Verdict
from mtl_export.parity.run import versions
from mtl_export.parity.tolerance import Tolerance, noise_floor
from mtl_export.runtime.runners.base import Runner

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Error maps have so many parts a side.
MAP_PARTS = 8
# Sizes of the batches by preset; graphs are traced at 2.
BATCHES = {"quick": (3,), "standard": (1, 3, 5), "full": (1, 2, 3, 5, 8)}


@dataclass(frozen=True)
class ImageCase:
    """A batch of images, ``[B, 3, H, H]`` float32, with a name."""

    name: str
    image: Array

    @property
    def inputs(self) -> dict[str, Array]:
        """Return what a runner takes."""
        return {IMAGE: self.image}


def seeded_cases(size: int, preset: str) -> list[ImageCase]:
    """Return batches of noise with large patches in it, of the spread that real images have."""
    cases = []
    for count in BATCHES[preset]:
        draw = np.random.default_rng(count)
        fine = draw.standard_normal((count, 3, size, size))
        coarse = draw.standard_normal((count, 3, size // 8 + 1, size // 8 + 1))
        patches = coarse.repeat(8, axis=2).repeat(8, axis=3)[:, :, :size, :size]
        cases.append(ImageCase(f"batch of {count}", (0.5 * fine + patches).astype(np.float32)))
    return cases


@dataclass(frozen=True)
class DenseReference:
    """What the unmerged model answers to a batch, in float64 and, by dtype, more coarsely.

    Attributes:
        case: The batch.
        raw: By task, ``[B, n, H, H]`` float64.
        coarse: By dtype, the same.
    """

    case: ImageCase
    raw: Mapping[str, Array]
    coarse: Mapping[str, Mapping[str, Array]]

    def floor(self, task: str, dtype: str, *, is_final: bool) -> float:
        """Return the noise floor of a task's raw or post-processed values."""
        coarse = self.coarse[dtype][task]
        if is_final and kind_of(task) != CLASSES:
            return noise_floor(final(task, self.raw[task]), final(task, coarse), dtype)
        return noise_floor(self.raw[task], coarse, dtype)


def final(task: str, raw: Array) -> Array:
    """Return the post-processed values of raw ones."""
    values: Array = postprocessed(task, torch.from_numpy(raw)).numpy()
    return values


@dataclass(frozen=True)
class DenseJudge:
    """Compares the exports of one model at one size of image.

    Attributes:
        model: As trained, at that size.
        artefacts: What ships.
        cases: The batches.
        tolerance: What is allowed.
        progress: Called with the name of each step.
    """

    model: DenseModel
    artefacts: Sequence[Artefact]
    cases: Sequence[ImageCase]
    tolerance: Tolerance
    progress: Callable[[str], None] = lambda step: None

    @property
    def steps(self) -> int:
        """Return how many steps ``report`` takes."""
        return 1 + len(self.artefacts)

    def report(self, *, not_there: Sequence[Cell] = (), localise: bool = True) -> ParityReport:
        """Return the verdict.

        Raises:
            UsageError: A tolerance is for an output that there is not.
        """
        self.progress("oracle fp64, and its noise floors")
        self.tolerance.refuse_unknown({task.name for task in self.model.tasks})
        cells: list[Cell] = []
        where = []
        for artefact in self.artefacts:
            self.progress(f"{artefact.name} {artefact.task.name if artefact.task else ''}".rstrip())
            found = self._judge(artefact)
            cells += found
            if localise and any(cell.verdict == "failed" for cell in found):
                one = localised(self.model, artefact, self.cases[0].inputs, self._factor)
                where.append(one if one.reason else replace(one, maps=self._maps(artefact)))
        digest = self.model.checkpoint.sha256
        return ParityReport(
            cells=(*cells, *not_there),
            tolerance=self.tolerance.describe(),
            noise_floors={
                dtype: {task.name: self._floor(task.name, dtype) for task in self.model.tasks}
                for dtype in self._dtypes
            },
            sources=dict.fromkeys(("base_sha256", "checkpoint_sha256"), digest),
            versions=versions(),
            localised=tuple(where),
            quantised=tuple(
                one
                for artefact in self.artefacts
                if artefact.quantised is not None
                for one in artefact.quantised.recorded.values()
            ),
        )

    def accuracy(
        self, images: Array, labels: Mapping[str, Array], max_drop: float
    ) -> tuple[AccuracyCell, ...]:
        """Return the score of every artefact on labelled images, beside the unmerged model's.

        Args:
            images: ``[N, 3, H, H]``.
            labels: By task; see ``images``.
            max_drop: Largest drop allowed; 0.01 is one point.

        Raises:
            CalibrationError: Labels do not fit the images, or no task has any.
        """
        tasks = [task.name for task in self.model.tasks if task.name in labels]
        tasks = [task for task in tasks if score_of(task) is not None]
        if not tasks:
            raise CalibrationError(
                f"--dataset: it labels {shortened(labels) or 'nothing'}",
                expected=f"some of {shortened(task.name for task in self.model.tasks)}",
                fix="Name each array of labels after its task",
            )
        size = self.model.described.image_size
        for task in tasks:
            refuse_misshaped(task, labels[task], len(images), size)
        self.progress("scores: unmerged")
        before = self._sums(self.model.trained(), images, labels, tasks)
        cells = []
        for artefact in self.artefacts:
            self.progress(f"scores: {artefact.name}")
            own = [one for one in tasks if artefact.task is None or artefact.task.name == one]
            if artefact.defect or not own:
                continue
            with suppress(BackendMissingError), artefact.runner as runner:
                after = self._sums(runner, images, labels, own)
                cells += [
                    judge_scores(artefact.name, task, before[task], after[task], size=size,
                                 max_drop=max_drop)
                    for task in own if task in after
                ]  # fmt: skip
        return tuple(cells)

    def _sums(
        self,
        runner: Runner | MTLoRASwin,
        images: Array,
        labels: Mapping[str, Array],
        tasks: Sequence[str],
    ) -> dict[str, Array]:
        """Return each task's sums, image by image."""
        found: dict[str, list[Array]] = {task: [] for task in tasks}
        for place in range(len(images)):
            image = images[place : place + 1]
            if isinstance(runner, MTLoRASwin):
                with torch.inference_mode():
                    answers = {k: v.numpy() for k, v in runner(torch.from_numpy(image)).items()}
            else:
                answers = runner.infer({IMAGE: image})
            for task in tasks:
                score = score_of(task)
                is_raw = task in answers and answers[task].shape[2:] == image.shape[2:]
                if score is None or not is_raw:
                    continue  # a score needs raw values, not post-processed ones
                found[task].append(score.sums(answers[task][0], labels[task][place]))
        return {task: np.stack(sums) for task, sums in found.items() if sums}

    def _maps(self, artefact: Artefact) -> dict[str, list[list[float]]]:
        """Return each task's error, the largest in each part of the map, in noise floors."""
        reference, maps = self.references[0], {}
        with artefact.runner as runner:
            found = runner.infer(reference.case.inputs)
        for task, raw in reference.raw.items():
            if task in found and found[task].shape == raw.shape:
                errors = np.abs(found[task] - raw).max((0, 1)) / self._floor(task, artefact.dtype)
                rows = np.array_split(errors, MAP_PARTS)
                parts = [np.array_split(row, MAP_PARTS, axis=1) for row in rows]
                maps[task] = [[round(float(part.max()), 2) for part in row] for row in parts]
        return maps

    @property
    def _factor(self) -> float:
        return self.tolerance.factor

    @property
    def _dtypes(self) -> list[str]:
        return sorted({one.dtype for one in self.artefacts} | {"fp32"})

    @cached_property
    def references(self) -> tuple[DenseReference, ...]:
        """Return what the unmerged model answers to each batch, computed once."""
        coarse = {name: self._answers(DTYPES[name]) for name in self._dtypes}
        exact = self._answers(torch.float64)
        return tuple(
            DenseReference(case, exact[at], {name: own[at] for name, own in coarse.items()})
            for at, case in enumerate(self.cases)
        )

    def _answers(self, dtype: torch.dtype) -> list[dict[str, Array]]:
        model = self.model.trained(dtype)
        with torch.inference_mode():
            return [
                {
                    task: value.double().numpy()
                    for task, value in model(torch.from_numpy(case.image).to(dtype)).items()
                }
                for case in self.cases
            ]

    def _floor(self, task: str, dtype: str, *, is_final: bool = False) -> float:
        return max(one.floor(task, dtype, is_final=is_final) for one in self.references)

    def _judge(self, artefact: Artefact) -> list[Cell]:
        """Return the cells of one artefact."""
        name = artefact.task.name if artefact.task else "*"

        def whole(verdict: Verdict, reason: str, case: str = "*") -> Cell:
            return Cell(artefact.name, artefact.runner.name, name, case, verdict, reason)

        if artefact.defect:
            return [whole("failed", artefact.defect)]
        if artefact.checkpoint_sha256 != self.model.checkpoint.sha256:
            return [
                whole("failed", "it was made from another checkpoint, or does not say from which")
            ]
        cells: list[Cell] = []
        try:
            with artefact.runner as runner:
                for reference in self.references:
                    cells += self._compare(artefact, runner, reference)
            if artefact.quantised is not None:
                cells = self._quantised(artefact, cells)
            else:
                cells += isolation_cells(self.model, artefact, self.cases[0].inputs)
        except BackendMissingError as error:
            cells.append(whole("not-run", str(error)))
        except MtlExportError as error:
            cells.append(whole("failed", str(error)))
        return cells

    def _quantised(self, artefact: Artefact, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells of an artefact with Q/DQ: what calibrate counted is what is judged.

        Errors on the seeded images are told, not judged: they are noise to it.
        """
        told = [
            cell if cell.max_abs_error is None
            else replace(cell, verdict="passed", reason="", limit=None, noise_floor=None)
            for cell in cells
        ]  # fmt: skip
        recorded = artefact.quantised.recorded if artefact.quantised else {}
        tasks = dict.fromkeys(cell.task for cell in told)
        return told + [as_calibrated(artefact.cell(one), recorded.get(one)) for one in tasks]

    def _compare(self, artefact: Artefact, runner: Runner, reference: DenseReference) -> list[Cell]:
        found = runner.infer(reference.case.inputs)
        tasks = [artefact.task] if artefact.task else answered(self.model, artefact)
        others = sorted(found.keys() - {task.name for task in tasks})
        cells = [self._cell(artefact, task.name, reference, found.get(task.name)) for task in tasks]
        if others:
            reason = f"it also answers {', '.join(others)}"
            cells = [replace(cell, verdict="failed", reason=reason) for cell in cells]
        return cells

    def _cell(
        self, artefact: Artefact, task: str, reference: DenseReference, found: Array | None
    ) -> Cell:
        """Return the comparison of one task's map."""
        raw = reference.raw[task]
        cell = Cell(
            artefact.name, artefact.runner.name, task, reference.case.name, "failed", output=task
        )
        if found is None:
            return replace(cell, reason=f"it has no output {task!r}")
        is_final = found.shape != raw.shape
        wanted = final(task, raw) if is_final else raw
        if found.shape != wanted.shape:
            return replace(cell, reason=f"{task} is {list(found.shape)}, not {list(raw.shape)}")
        if not np.isfinite(found).all():
            return replace(cell, reason=f"{task} has NaN or Inf")
        rule, floor = self.tolerance.of(task), self._floor(task, artefact.dtype, is_final=is_final)
        limit = float(rule.allowed(raw, self._floor(task, artefact.dtype)).max())
        counts = decided(task, raw, found, limit, is_final=is_final)
        cell = replace(
            cell, decisions=(counts.total, counts.equal, counts.ties) if counts.total else None
        )
        if is_final and kind_of(task) == CLASSES:
            reason = _changed(counts)
            return replace(cell, verdict="failed" if reason else "passed", reason=reason,
                           max_abs_error=0.0, noise_floor=floor, limit=limit)  # fmt: skip
        allowed = rule.allowed(wanted, floor)
        error = difference(wanted, found, allowed)
        reason = ""
        if error.excess > 0:
            beyond = float((np.abs(found - wanted) > allowed).mean())
            reason = (
                f"off by {error.max_abs:.3g} at {place(error.index)},"
                f" {float(allowed.max()):.3g} allowed; {beyond:.2%} of the map is beyond that"
            )
        reason = reason or _changed(counts)
        return replace(
            cell,
            verdict="failed" if reason else "passed",
            reason=reason,
            max_abs_error=error.max_abs,
            noise_floor=floor,
            limit=float(allowed.max()),
            least_atol=rule.least_atol(wanted, np.abs(found - wanted)),
        )


def answered(model: DenseModel, artefact: Artefact) -> list[Task]:
    """Return the tasks that a graph of all tasks answers: those left after edits."""
    if artefact.edited is None:
        return list(model.tasks)
    left = {task.name for task in artefact.edited.tasks}
    return [task for task in model.tasks if task.name in left]


def decided(task: str, raw: Array, found: Array, limit: float, *, is_final: bool) -> Decisions:
    """Return how many pixels get the same class, or lie on the same side of 0.5.

    A changed one is a tie where the reference's margin is within what both sides may be off by.
    """
    kind = kind_of(task)
    if kind == CLASSES:
        same = raw.argmax(1) == (found if is_final else found.argmax(1))
        top = np.partition(raw, -2, axis=1) if raw.shape[1] > 1 else np.zeros((*raw.shape[:1], 2))
        close = top[:, -1] - top[:, -2] <= 2 * limit
    elif kind == PROBABILITY:
        same = (raw[:, 0] > 0) == (found > 127.5 if is_final else found[:, 0] > 0)
        close = np.abs(raw[:, 0]) <= limit
    else:
        return Decisions(0, 0, 0)
    return Decisions(int(same.size), int(same.sum()), int((~same & close).sum()))


def _changed(counts: Decisions) -> str:
    return f"{counts.changed} of {counts.total} pixels decide otherwise" if counts.changed else ""


def place(index: Sequence[int]) -> str:
    """Return where in a map, in words."""
    return f"image {index[0]}, {', '.join(map(str, index[1:]))}"
