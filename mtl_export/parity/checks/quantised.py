"""The verdict on a quantised artefact, whose error no rule for float arithmetic allows.

    every case       shapes, labels and NaN are judged as of any artefact; errors are reported
    quantised        the noise of a task's logits, over all cases, is at most a tenth of their
                     energy (10 dB); how many decisions are the same is reported
    without Q/DQ     its graph, with Q/DQ taken out and the float weights put back, keeps the
                     rule for float graphs, and its stored weights are those weights, rounded
    as calibrated    what calibrate counted for these very bytes: points of accuracy lost on
                     labelled rows, or of decisions changed where there are no labels; at most
                     --max-drop where it is given, else what calibrate was allowed

A task whose ranges are another's loses points where rows are counted, and noise here. Whether
rows of a user's own keep their accuracy, ``parity --dataset`` tells, as for any artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import shortened
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.checks.logits import compare_case
from mtl_export.parity.metrics import decisions, sqnr_db
from mtl_export.parity.outputs import answers
from mtl_export.parity.reference import Floors, Reference
from mtl_export.parity.report import Cell, worst
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.base import Runner

QUANTISED, PLAIN, RECORDED = "quantised", "without Q/DQ", "as calibrated"
# Noise of a tenth of the signal's energy. Examples/01 in int8 has 16 dB on random tokens and 22
# on sentences for its worst task; one task's delta left out of a layer has less than 10.
LEAST_DB = 10.0
# An error that no logit has: what is compared then is everything but the error.
_ANY = 1e30


class _Recorder:
    """A runner that remembers what it answered last."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self.name = runner, runner.name
        self.last: Mapping[str, Array] = {}

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the runner open: it is another's."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one batch."""
        found = self._runner.infer(inputs)
        self.last = found
        return found


def quantised_cells(
    bound: BoundModel,
    artefact: Artefact,
    runner: Runner,
    exact: Sequence[Reference],
    floors: Floors,
) -> tuple[list[Cell], float]:
    """Return the cells on what a quantised artefact answers, and its largest error.

    Args:
        bound: The checkpoint and its base.
        artefact: Its ``quantised`` is not None.
        runner: Its runner, open.
        exact: What the oracle answers.
        floors: Of the dtype that is not quantised.
    """
    recorder, cells = _Recorder(runner), []
    pairs: dict[str, list[tuple[Array, Array]]] = {}
    for _, group in groupby(exact, key=lambda one: id(one.case)):
        references = list(group)
        found = compare_case(
            bound, artefact, recorder, references, floors, Tolerance(atol=_ANY, rtol=0.0)
        )
        cells += [_without_limit(cell) for cell in found]
        whole = {cell.task for cell in found if cell.max_abs_error is not None}
        for task in bound.adapters.tasks:
            if task.name in whole and artefact.task in {None, task}:
                pair = _pair(references[0], recorder.last, task.index, len(task.labels), artefact)
                pairs.setdefault(task.name, []).append(pair)
    cells += [
        _noise(artefact, runner, task, pairs[task.name])
        for task in bound.adapters.tasks
        if task.name in pairs
    ]
    cells += recorded_cells(artefact, runner, list(pairs))
    return cells, max((cell.max_abs_error or 0.0 for cell in cells), default=0.0)


def plain_cells(
    artefact: Artefact,
    judge: Callable[[Artefact], list[Cell]],
    *,
    threads: int,
    left_out: Collection[str] = (),
) -> list[Cell]:
    """Return the cells on the graph without Q/DQ: one for each task, or each that failed.

    Args:
        artefact: Its ``quantised`` is not None; an engine has no graph and no cells.
        judge: Returns the cells of a float artefact.
        threads: Of ONNX Runtime.
        left_out: Cases and checks that are not run, which the artefact's own cells say.
    """
    path, known = artefact.path, artefact.quantised
    if path is None or path.suffix != ".onnx" or known is None:
        return []
    name = artefact.task.name if artefact.task else "*"
    cell = Cell(artefact.name, artefact.runner.name, name, PLAIN, "passed")
    if known.float_path is None or not known.float_path.is_file():
        reason = "the float graph it was made from is not there; mtl-export onnx makes it"
        return [replace(cell, verdict="not-run", reason=reason)]
    from mtl_export.parity.checks.dequantised import write_dequantised

    with TemporaryDirectory(prefix="mtl-export-") as folder:
        plain = Path(folder) / path.name
        try:
            problems = write_dequantised(path, known.float_path, plain)
        except (ValueError, OSError) as error:
            # onnx-ir refuses data files with several hard links, which ONNX Runtime may read.
            return [replace(cell, verdict="not-run", reason=str(error))]
        if problems:
            return [replace(cell, verdict="failed", reason=shortened(problems))]
        runner = OrtRunner(plain, threads=threads)
        found = judge(replace(artefact, runner=runner, path=plain, quantised=None))
    return _collapsed([cell for cell in found if cell.case not in left_out])


def _collapsed(cells: Sequence[Cell]) -> list[Cell]:
    collapsed = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        bad = [cell for cell in own if cell.verdict != "passed"]
        for cell in bad:
            collapsed.append(replace(cell, case=f"{PLAIN}, {cell.case}"))
        if not bad:
            collapsed.append(replace(worst(own), case=PLAIN))
    return collapsed


def _without_limit(cell: Cell) -> Cell:
    """Return the cell of one case; its error is told, not judged."""
    if cell.max_abs_error is None:
        return cell
    return replace(cell, verdict="passed", reason="", limit=None, noise_floor=None, least_atol=None)


def _pair(
    one: Reference, found: Mapping[str, Array], index: int, labels: int, artefact: Artefact
) -> tuple[Array, Array]:
    rows = one.case.task_ids == index
    width = (one.subject.decides and labels) or one.logits.shape[-1]
    reference = answers(one.case, rows, one.logits)[:, :width]
    candidate = found[one.subject.output]
    if artefact.task is None:
        return reference, answers(one.case, rows, candidate)[:, :width]
    own = replace(one.case, inputs=one.case.rows(rows))
    everything = np.ones(len(candidate), np.bool_)
    return reference, answers(own, everything, candidate)[:, :width]


def _noise(
    artefact: Artefact, runner: Runner, task: Task, pairs: Sequence[tuple[Array, Array]]
) -> Cell:
    reference = np.concatenate([pair[0] for pair in pairs])
    candidate = np.concatenate([pair[1] for pair in pairs])
    found = sqnr_db(reference, candidate)
    same = decisions(reference, candidate, task.kind, 0.0)
    reason = ""
    if found < LEAST_DB:
        reason = (
            f"the signal is {found:.1f} dB above the noise of quantising, {LEAST_DB:g} are"
            f" needed; {same.equal} of {same.total} decisions are the same"
        )
    return Cell(
        artefact.name, runner.name, task.name, QUANTISED, "failed" if reason else "passed", reason,
        decisions=(same.total, same.equal, same.ties), sqnr_db=found,
    )  # fmt: skip


def recorded_cells(artefact: Artefact, runner: Runner, tasks: Sequence[str]) -> list[Cell]:
    """Return a cell for each task on what calibrate counted; none where it left no report."""
    known = artefact.quantised
    assert known is not None
    cells = []
    for task in tasks:
        record, reason = known.recorded.get(task), ""
        cell = Cell(artefact.name, runner.name, task, RECORDED, "passed")
        if record is None:
            reason = "there is no report of calibrate beside it"
            cells.append(replace(cell, verdict="not-run", reason=reason))
            continue
        if not record.drop <= record.allowed:
            of = "of accuracy" if record.labelled else "of decisions"
            reason = (
                f"it lost {record.drop:.2f} points {of} on {record.rows:,} rows; allowed is"
                f" {record.allowed:g} {record.allowed_by}"
            )
        cells.append(replace(cell, verdict="failed" if reason else "passed", reason=reason))
    return cells
