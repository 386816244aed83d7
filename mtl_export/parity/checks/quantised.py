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

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.checks.dequantised import write_dequantised
from mtl_export.parity.checks.logits import compare_case
from mtl_export.parity.judged import Judged
from mtl_export.parity.metrics import decisions, sqnr_db
from mtl_export.parity.outputs import answers
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell, RecordedTask, worst
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.ort import OrtRunner

QUANTISED, PLAIN, RECORDED = "quantised", "without Q/DQ", "as calibrated"
# Noise of a tenth of the signal's energy. Examples/01 in int8 has 16 dB on random tokens and 22
# on sentences for its worst task; one task's delta left out of a layer has less than 10.
LEAST_DB = 10.0
# An error that no logit has: what is compared then is everything but the error.
_ANY = Tolerance(atol=1e30, rtol=0.0)


def quantised_cells(judged: Judged) -> tuple[list[Cell], float]:
    """Return the cells on what a quantised artefact answers, and its largest error."""
    artefact = judged.artefact
    assert artefact.quantised is not None
    cells = []
    pairs: dict[str, list[tuple[Array, Array]]] = {}
    for _, group in groupby(judged.exact, key=lambda one: id(one.case)):
        references = list(group)
        outputs = artefact.infer(references[0].case.inputs)
        found = compare_case(replace(judged, tolerance=_ANY), references, outputs)
        cells += [_without_limit(cell) for cell in found]
        whole = {cell.task for cell in found if cell.max_abs_error is not None}
        for task in judged.tasks:
            if task.name in whole:
                candidate = outputs[judged.output(references[0])]
                pairs.setdefault(task.name, []).append(_pair(references[0], candidate, task))
    own = {task.name: task for task in judged.tasks if task.name in pairs}
    cells += [_noise(artefact.cell(name), task, pairs[name]) for name, task in own.items()]
    recorded = artefact.quantised.recorded
    cells += [as_calibrated(artefact.cell(name), recorded.get(name)) for name in pairs]
    return cells, max((cell.max_abs_error or 0.0 for cell in cells), default=0.0)


def plain_cells(judged: Judged, judge: Callable[[Artefact], list[Cell]]) -> list[Cell]:
    """Return the cells on the graph without Q/DQ: one for each task, or each that failed.

    Args:
        judged: A quantised artefact; an engine has no graph and no cells.
        judge: Returns the cells of a float artefact.
    """
    artefact = judged.artefact
    path, known, cell = artefact.graph, artefact.quantised, artefact.cell()
    if path is None or known is None:
        return []
    if known.float_path is None or not known.float_path.is_file():
        reason = "the float graph it was made from is not there; mtl-export onnx makes it"
        return [cell.not_run(PLAIN, reason)]
    with TemporaryDirectory(prefix="mtl-export-") as folder:
        plain = Path(folder) / path.name
        try:
            problems = write_dequantised(path, known.float_path, plain)
        except (ValueError, OSError) as error:
            # onnx-ir refuses data files with several hard links, which ONNX Runtime may read.
            return [cell.not_run(PLAIN, str(error))]
        if problems:
            return [cell.judged(PLAIN, *problems)]
        runner = OrtRunner(plain, threads=judged.threads)
        found = judge(replace(artefact, runner=runner, path=plain, quantised=None))
    by_task: dict[str, list[Cell]] = {}
    for cell in found:
        if cell.case not in judged.extra.left_out:  # the artefact's own cells say that
            by_task.setdefault(cell.task, []).append(cell)
    cells = []
    for own in by_task.values():
        bad = [replace(c, case=f"{PLAIN}, {c.case}") for c in own if c.verdict != "passed"]
        cells += bad or [replace(worst(own), case=PLAIN)]
    return cells


def _without_limit(cell: Cell) -> Cell:
    """Return the cell of one case; its error is reported, not judged."""
    if cell.max_abs_error is None:
        return cell
    return replace(cell, verdict="passed", reason="", limit=None, noise_floor=None, least_atol=None)


def _pair(one: Reference, candidate: Array, task: Task) -> tuple[Array, Array]:
    """Return the oracle's and the artefact's numbers that count for a task, ``[N, L]``."""
    rows = one.case.task_ids == task.index
    width = (one.subject.decides and len(task.labels)) or one.logits.shape[-1]
    reference, found = (answers(one.case, rows, values) for values in (one.logits, candidate))
    return reference[:, :width], found[:, :width]


def _noise(cell: Cell, task: Task, pairs: Sequence[tuple[Array, Array]]) -> Cell:
    reference, candidate = (np.concatenate(values) for values in zip(*pairs, strict=True))
    found = sqnr_db(reference, candidate)
    same = decisions(reference, candidate, task.kind, 0.0)
    reason = ""
    if found < LEAST_DB:
        reason = (
            f"the signal is {found:.1f} dB above the noise of quantising, {LEAST_DB:g} are"
            f" needed; {same.equal} of {same.total} decisions are the same"
        )
    counts = (same.total, same.equal, same.ties)
    return replace(cell.judged(QUANTISED, reason), decisions=counts, sqnr_db=found)


def as_calibrated(cell: Cell, record: RecordedTask | None) -> Cell:
    """Return the cell of a task on what calibrate counted."""
    if record is None:
        return cell.not_run(RECORDED, "there is no report of calibrate beside it")
    if record.drop <= record.allowed:
        return cell.judged(RECORDED)
    of = "of accuracy" if record.labelled else "of decisions"
    return cell.judged(
        RECORDED,
        f"it lost {record.drop:.2f} points {of} on {record.rows:,} rows; allowed is"
        f" {record.allowed:g} {record.allowed_by}",
    )
