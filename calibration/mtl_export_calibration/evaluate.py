"""A float graph and its quantised one -> per task, what quantising costs; and how fast both are.

drop   points of accuracy lost where labels are known; else points of decisions that
       differ from the float graph's, which no loss of accuracy can exceed; for
       regression, points of variance not shared
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.json_file import Shape
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import MASK, NO_LABEL, Samples
from mtl_export.errors import CalibrationError
from mtl_export.names import LOGITS, TASK_IDS
from mtl_export.parity.accuracy.scores import Answers, accuracy
from mtl_export.parity.metrics import decisions, sqnr_db
from mtl_export.runtime.ort import OrtRunner

BATCH = 32
LATENCY_BATCH, LATENCY_LENGTH, LATENCY_ROUNDS = 8, 128, 15


# ``TaskScore.as_dict`` as JSON; graphs that agree in every value have an infinite SQNR.
SCORE: Shape = {
    "task": str,
    "rows": int,
    "labelled": int,
    "float_accuracy": (float, None),
    "accuracy": (float, None),
    "agreement": float,
    "drop": float,
    "sqnr_db": Real,
}


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
) -> dict[int, Answers]:
    """Return what the graph at ``path`` answers, by task index, in the order of its batches.

    Of a graph that answers for every token, each token is a row.

    Raises:
        CalibrationError: The graph has no logits.
    """
    parts: dict[int, list[Answers]] = {}
    done = 0
    with OrtRunner(path, threads=threads) as runner:
        wanted = set(runner.inputs)
        for batch in samples.batches(BATCH):
            feed = {**batch.arrays, TASK_IDS: batch.task_ids}
            outputs = runner.infer({n: v for n, v in feed.items() if n in wanted})
            if LOGITS not in outputs:
                raise CalibrationError(
                    f"{path}: outputs {', '.join(outputs)}",
                    expected=f"an output {LOGITS}, because what quantising costs is told by it",
                    fix="Calibrate a model with classification heads",
                )
            logits = outputs[LOGITS].astype(np.float64)
            owners, labels = batch.task_ids, batch.labels
            if logits.ndim == 3:
                mask = batch.arrays.get(MASK, np.ones(logits.shape[:2], np.int64)) != 0
                owners = np.broadcast_to(owners[:, None], mask.shape)[mask]
                labels = np.full(len(owners), NO_LABEL)
                logits = logits[mask]
            for index in np.unique(owners).tolist():
                own = owners == index
                parts.setdefault(index, []).append(Answers(logits[own], labels[own]))
            done += len(batch)
            progress(done, len(samples))
    return {index: _joined(found) for index, found in parts.items()}


def _joined(parts: Sequence[Answers]) -> Answers:
    return Answers(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def score(reference: Answers, candidate: Answers, task: Task) -> TaskScore:
    """Return what ``candidate``, the quantised graph, costs ``task``, whose rows these are."""
    width = len(task.labels) or reference.logits.shape[1]
    before, after = reference.logits[:, :width], candidate.logits[:, :width]
    known = reference.labels != NO_LABEL
    # Without a margin every changed decision counts.
    same = decisions(before, after, task.kind, 0.0)
    share = same.equal / same.total if same.total else 1.0
    float_accuracy = quantised_accuracy = None
    drop = 100.0 * (1.0 - share)
    if not np.isfinite(after).all():
        drop = 100.0
    elif task.kind == "regression":
        drop = 100.0 * (1.0 - _shared_variance(before, after))
    elif known.any() and task.kind == "single_label_classification":
        truth = reference.labels[known]
        float_accuracy = accuracy(Answers(before[known], truth))
        quantised_accuracy = accuracy(Answers(after[known], truth))
        drop = 100.0 * (float_accuracy - quantised_accuracy)
    return TaskScore(
        task=task.name,
        rows=len(before),
        labelled=int(known.sum()) if quantised_accuracy is not None else 0,
        float_accuracy=float_accuracy,
        accuracy=quantised_accuracy,
        agreement=share,
        drop=drop,
        sqnr_db=sqnr_db(before, after),
    )


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
