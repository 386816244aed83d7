"""A float graph and its quantised one -> per task, what quantising costs; and how fast both are.

    drop   points of accuracy lost where labels are known; else points of decisions that
           differ from the float graph's, which no loss of accuracy can exceed; for
           regression, points of variance not shared

B rows, L logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CalibrationError
from mtl_export.runtime.ort import OrtRunner
from mtl_export_calibration.data import TASK_IDS
from mtl_export_calibration.samples import MASK, NO_LABEL, Samples
from mtl_export_calibration.sqnr import sqnr_db

BATCH = 32
LATENCY_BATCH, LATENCY_LENGTH, LATENCY_ROUNDS = 8, 128, 15
OUTPUT = "logits"


@dataclass(frozen=True)
class Answers:
    """A graph's logits on samples.

    Attributes:
        logits: float32 ``[B, L]``; for tokens, one row each.
        task_ids: int64 ``[B]``.
        labels: int64 ``[B]``.
    """

    logits: Array
    task_ids: Array
    labels: Array


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What quantising costs one task.

    Attributes:
        task: Its name.
        rows: Rows compared.
        labelled: Of these, with a label.
        float_accuracy: The float graph's, None without labels.
        accuracy: The quantised graph's.
        agreement: Share of decisions that are the same.
        drop: Points lost, see the module's docstring.
        sqnr_db: Of the logits.
    """

    task: str
    rows: int
    labelled: int
    float_accuracy: float | None
    accuracy: float | None
    agreement: float
    drop: float
    sqnr_db: float

    def as_dict(self) -> dict[str, Any]:
        """Return JSON's types."""
        return asdict(self)


def answers(
    path: Path,
    samples: Samples,
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Return the logits of the graph at ``path``, rows in the order of ``Samples.batches``.

    Raises:
        CalibrationError: The graph has no logits.
    """
    logits, task_ids, labels = [], [], []
    done = 0
    with OrtRunner(path, threads=threads) as runner:
        wanted = set(runner.inputs)
        for batch in samples.batches(BATCH):
            feed = {**batch.arrays, TASK_IDS: batch.task_ids}
            outputs = runner.infer({n: v for n, v in feed.items() if n in wanted})
            if OUTPUT not in outputs:
                raise CalibrationError(
                    where=str(path),
                    found=f"outputs {', '.join(outputs)}",
                    expected=f"an output {OUTPUT}",
                    why="what quantising costs is told by it",
                    fix="Calibrate a model with classification heads",
                )
            value = outputs[OUTPUT].astype(np.float32)
            owners, truth = batch.task_ids, batch.labels
            if value.ndim == 3:
                mask = batch.arrays.get(MASK, np.ones(value.shape[:2], np.int64)) != 0
                owners = np.broadcast_to(owners[:, None], mask.shape)[mask]
                truth = np.full(len(owners), NO_LABEL)
                value = value[mask]
            logits.append(value)
            task_ids.append(owners)
            labels.append(truth)
            done += len(batch)
            progress(done, len(samples))
    return Answers(np.concatenate(logits), np.concatenate(task_ids), np.concatenate(labels))


def score(reference: Answers, candidate: Answers, task: Task) -> TaskScore:
    """Return what ``candidate``, the quantised graph, costs ``task``."""
    own = reference.task_ids == task.index
    width = len(task.labels) or reference.logits.shape[1]
    before, after = reference.logits[own, :width], candidate.logits[own, :width]
    labels = reference.labels[own]
    known = labels != NO_LABEL
    same = _same_decisions(before, after, task)
    share = float(same.mean()) if same.size else 1.0
    float_accuracy = accuracy = None
    drop = 100.0 * (1.0 - share)
    if not np.isfinite(after).all():
        drop = 100.0
    elif task.kind == "regression":
        drop = 100.0 * (1.0 - _shared_variance(before, after))
    elif known.any() and task.kind == "single_label_classification":
        truth = labels[known]
        float_accuracy = float((before[known].argmax(axis=1) == truth).mean())
        accuracy = float((after[known].argmax(axis=1) == truth).mean())
        drop = 100.0 * (float_accuracy - accuracy)
    labelled = int(known.sum()) if accuracy is not None else 0
    noise = sqnr_db(before, after)
    return TaskScore(
        task.name, int(own.sum()), labelled, float_accuracy, accuracy, share, drop, noise
    )


def _same_decisions(before: Array, after: Array, task: Task) -> Array:
    if task.kind == "multi_label_classification":
        same: Array = ((before > 0) == (after > 0)).all(axis=1)
        return same
    if task.kind == "regression" or before.shape[1] < 2:
        return np.ones(len(before), np.bool_)
    same = before.argmax(axis=1) == after.argmax(axis=1)
    return same


def _shared_variance(before: Array, after: Array) -> float:
    total = float(((before - before.mean(axis=0)) ** 2).sum())
    rest = float(((before - after) ** 2).sum())
    return 1.0 if rest == 0.0 else max(0.0, 1.0 - rest / total) if total else 0.0


def latencies_ms(
    paths: Sequence[Path], samples: Samples, *, length: int = LATENCY_LENGTH, threads: int = 0
) -> list[float]:
    """Return the median latency of graphs on 8 rows of ``length`` tokens, taken in turns.

    Rows of other kinds than text are taken as they are.
    """
    feed = _latency_inputs(samples, length)
    runners = [OrtRunner(path, threads=threads) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    for runner in runners:
        runner.__enter__()
    try:
        feeds = [{n: feed[n] for n in runner.inputs} for runner in runners]
        for turn in range(LATENCY_ROUNDS + 1):
            for runner, inputs, taken in zip(runners, feeds, times, strict=True):
                started = time.perf_counter()
                runner.infer(inputs)
                if turn:  # the first run allocates
                    taken.append((time.perf_counter() - started) * 1000.0)
    finally:
        for runner in runners:
            runner.__exit__(None, None, None)
    return [float(np.median(taken)) for taken in times]


def _latency_inputs(samples: Samples, length: int) -> dict[str, Array]:
    rows = samples.take(np.arange(LATENCY_BATCH) % len(samples))
    mask = rows.arrays.get(MASK)
    feed = {**rows.arrays, TASK_IDS: rows.task_ids}
    if mask is None or mask.ndim != 2:
        return feed
    for name, value in rows.arrays.items():
        if value.shape == mask.shape:
            feed[name] = np.resize(value, (LATENCY_BATCH, length))
    feed[MASK] = np.ones((LATENCY_BATCH, length), mask.dtype)
    return feed
