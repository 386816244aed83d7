"""Labelled rows through the oracle and every artefact -> what each task's score drops by.

    rows -> oracle, float64 -> score of the reference --+
    rows -> artefact        -> score of the candidate --+--> ``judge_accuracy``, by task

Rows are asked in batches of mixed tasks, each cut to its own longest row.

N rows, L labels, S tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, MtlExportError, ParityError
from mtl_export.names import ATTENTION_MASK, LOGITS, TASK_IDS
from mtl_export.parity.accuracy.gate import judge_accuracy
from mtl_export.parity.accuracy.scores import Answers
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.report import AccuracyCell, Verdict
from mtl_export.runtime.runners.base import Runner

BATCH = 32


@dataclass(frozen=True)
class Truth:
    """What is right for the rows of one task.

    Attributes:
        score: What the task is judged by, a key of ``SCORES``.
        labels: As in ``Answers``, in the order of the task's rows.
        queries: Likewise.
    """

    score: str
    labels: Array
    queries: Array | None = None


@dataclass(frozen=True)
class LabelledRows:
    """Rows as the model takes them.

    Attributes:
        inputs: By name, ``[N, ...]``, with ``task_ids``.
        truths: By task name; every task has some rows.
    """

    inputs: Mapping[str, Array]
    truths: Mapping[str, Truth]

    def __len__(self) -> int:
        """Return N."""
        return len(self.inputs[TASK_IDS])


def accuracy_cells(
    bound: BoundModel,
    artefacts: Sequence[Artefact],
    rows: LabelledRows,
    *,
    oracle: Callable[[str], Runner],
    max_drop: float,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[AccuracyCell, ...]:
    """Return one cell for each artefact and task that it serves.

    Args:
        bound: The checkpoint and its base.
        artefacts: What ships.
        rows: What all of them are asked.
        oracle: As for ``run_parity``.
        max_drop: Largest drop allowed, in the scores' own unit.
        progress: Called with the name of each step; ``1 + len(artefacts)`` in all.

    Raises:
        ParityError: The oracle answers with NaN or Inf, or has no logits.
        CalibrationError: A score is not defined on a task's rows.
    """
    progress("oracle fp64, labelled rows")
    with oracle("fp64") as runner:
        exact = logits_of(runner, rows.inputs)
    if exact is None or not all(
        np.isfinite(exact[rows.inputs[TASK_IDS] == task.index, : len(task.labels) or None]).all()
        for task in bound.adapters.tasks
    ):
        raise ParityError(
            "oracle in fp64, labelled rows: "
            f"{'no logits' if exact is None else 'logits that are NaN or Inf'}",
            expected="finite logits, one row each, because scores are counted on them",
            fix="Leave out --dataset, or check base and checkpoint",
        )
    cells: list[AccuracyCell] = []
    for artefact in artefacts:
        own = artefact.task.name if artefact.task else ""
        progress(f"{artefact.name} {own}".rstrip() + ", labelled rows")
        cells += _judged(bound, artefact, rows, exact, max_drop)
    return tuple(cells)


def logits_of(runner: Runner, inputs: Mapping[str, Array]) -> Array | None:
    """Return the logits of all rows, ``[N, L]``, in their order; None where there are none."""
    count = len(next(iter(inputs.values())))
    lengths = _lengths(inputs, count)
    order = np.argsort(lengths, kind="stable")
    logits: Array | None = None
    for begin in range(0, count, BATCH):
        chosen = order[begin : begin + BATCH]
        batch = _cut({n: value[chosen] for n, value in inputs.items()}, lengths[chosen])
        found = runner.infer(batch).get(LOGITS)
        if found is None or found.ndim != 2 or len(found) != len(chosen):
            return None
        if logits is None:
            logits = np.full((count, found.shape[1]), np.nan)
        if found.shape[1] != logits.shape[1]:
            return None
        logits[chosen] = found
    return logits


def _judged(
    bound: BoundModel, artefact: Artefact, rows: LabelledRows, exact: Array, max_drop: float
) -> list[AccuracyCell]:
    ids = rows.inputs[TASK_IDS]
    served = bound.adapters.tasks if artefact.task is None else (artefact.task,)
    inputs: Mapping[str, Array] = rows.inputs
    chosen = np.ones(len(ids), np.bool_)
    if artefact.task is not None:
        chosen = ids == artefact.task.index
        inputs = {name: value[chosen] for name, value in inputs.items() if name != TASK_IDS}

    def all_of(verdict: Verdict, reason: str) -> list[AccuracyCell]:
        return [
            _unscored(artefact, task, rows.truths[task.name], max_drop, verdict, reason)
            for task in served
        ]

    if wrong := artefact.wrong_files(bound):
        return all_of("not-run", wrong)
    if artefact.edited is not None:
        return all_of("not-run", f"{artefact.edited.text}: scores are those of graphs as exported")
    try:
        with artefact.runner as runner:
            found = logits_of(runner, inputs)
    except BackendMissingError as error:
        return all_of("not-run", str(error))
    except MtlExportError as error:
        return all_of("failed", str(error))
    if found is None:
        return all_of("failed", f"no {LOGITS} of one row each")
    cells = []
    for task in served:
        own, truth = ids == task.index, rows.truths[task.name]
        width = len(task.labels) or exact.shape[1]
        reference = Answers(exact[own, :width], truth.labels, truth.queries)
        candidate = found[own[chosen], :width]
        if candidate.shape != reference.logits.shape:
            reason = f"{LOGITS} have {found.shape[1]} columns, the task has {width} labels"
            cells.append(_unscored(artefact, task, truth, max_drop, "failed", reason))
        else:
            cells.append(judge_accuracy(artefact.name, task.name, truth.score, reference,
                                        candidate, max_drop=max_drop))  # fmt: skip
    return cells


def _unscored(
    artefact: Artefact, task: Task, truth: Truth, max_drop: float, verdict: Verdict, reason: str
) -> AccuracyCell:
    return AccuracyCell(
        artefact.name, task.name, truth.score, len(truth.labels), None, None, None, None,
        max_drop, verdict, reason,
    )  # fmt: skip


def _lengths(inputs: Mapping[str, Array], count: int) -> Array:
    """Return the place of each row's last token: rows may be padded on either side."""
    mask = inputs.get(ATTENTION_MASK)
    if mask is None:
        return np.zeros(count, np.int64)
    places: Array = np.where(mask != 0, np.arange(1, mask.shape[1] + 1), 0).max(axis=1)
    return places


def _cut(batch: dict[str, Array], lengths: Array) -> dict[str, Array]:
    mask = batch.get(ATTENTION_MASK)
    if mask is None:
        return batch
    longest = max(1, int(lengths.max()))
    return {
        name: value[:, :longest] if value.shape[:2] == mask.shape else value
        for name, value in batch.items()
    }
