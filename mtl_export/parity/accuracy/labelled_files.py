"""Labelled data of any kind -> rows as the model takes them, with what is right for each.

The kinds are those of ``samples``: JSONL, a folder of it, npz, or a function. A row's ``label`` is

    one label of several     its name or index
    several labels           a list of names or indices; in an npz, bool [N, L]
    regression               a number
    ranking (ndcg)           a number, how relevant the row is; rows share a ``query``

N rows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.rows import Row, tokenize
from mtl_export.data.samples import LABELS, QUERIES, load_data, owners_of
from mtl_export.errors import CalibrationError, shortened
from mtl_export.names import TASK_IDS
from mtl_export.parity.accuracy.labelled_rows import LabelledRows, Truth
from mtl_export.parity.accuracy.scores import usual_score

RANKING = "ndcg"


def open_labelled(
    reference: str,
    tasks: Sequence[Task],
    tokenizer_folder: Path,
    *,
    max_length: int,
    scores: Mapping[str, str],
) -> LabelledRows:
    """Return the rows that ``reference`` names, each with its label.

    Args:
        reference: What ``samples.load_data`` takes.
        tasks: The checkpoint's tasks; each needs rows.
        tokenizer_folder: Folder of the base model.
        max_length: Longer texts are cut to this many tokens.
        scores: What tasks are judged by, by name; the others by what is usual for their kind,
            and by ndcg where rows have queries.

    Raises:
        CalibrationError: The data cannot be read, a row has no label that its task knows, a
            task has no row, or it has no labels at all.
    """
    headless = [task.name for task in tasks if task.kind == "headless"]
    if headless:
        raise CalibrationError(
            f"{reference}: labelled rows for {shortened(headless)}, which has no labels",
            expected=(
                "tasks with a classification or regression head, because a score is counted on "
                "their logits"
            ),
            fix="Leave out --dataset",
        )
    data = load_data(reference)
    owners = owners_of(data, tasks, reference)
    absent = [task.name for task in tasks if task.name not in owners]
    if absent:
        raise CalibrationError(
            f"{reference}: no row for {shortened(absent)}",
            expected=(
                "labelled rows of every task, because the worst task decides, and one without "
                "rows would never be it"
            ),
            fix="Add rows for these tasks",
        )
    names = np.array(owners)
    places = {task.name: np.flatnonzero(names == task.name) for task in tasks}
    if isinstance(data, dict):
        inputs = {n: value for n, value in data.items() if n not in {LABELS, QUERIES}}
        inputs[TASK_IDS] = inputs[TASK_IDS].astype(np.int64)
        return LabelledRows(inputs, _truths_of_arrays(data, tasks, places, scores, reference))
    truths = _truths_of_rows(data, tasks, places, scores, reference)
    return LabelledRows(tokenize(data, tokenizer_folder, tasks, max_length), truths)


def _truths_of_rows(
    rows: Sequence[Row],
    tasks: Sequence[Task],
    places: Mapping[str, Array],
    scores: Mapping[str, str],
    reference: str,
) -> dict[str, Truth]:
    truths, wrong = {}, []
    for task in tasks:
        own = [rows[place] for place in places[task.name]]
        queries = _queries([row.query for row in own])
        score = scores.get(task.name) or _usual(task, queries)
        labels = [_label(row.label, task, score) for row in own]
        wrong += [
            f"{rows[place].label!r} of task {task.name} (row {place + 1})"
            for place, label in zip(places[task.name], labels, strict=True)
            if label is None
        ]
        kept = [label for label in labels if label is not None]
        truths[task.name] = Truth(score, np.array(kept), queries)
    _refuse(wrong, reference)
    return truths


def _truths_of_arrays(
    data: Mapping[str, Array],
    tasks: Sequence[Task],
    places: Mapping[str, Array],
    scores: Mapping[str, str],
    reference: str,
) -> dict[str, Truth]:
    labels = data.get(LABELS)
    count = len(data[TASK_IDS])
    if labels is None or labels.ndim not in (1, 2) or labels.dtype.kind not in "iufb":
        raise CalibrationError(
            f"{reference}: "
            f"{'no labels' if labels is None else f'labels {labels.dtype} {labels.shape}'}",
            expected=(
                f"{LABELS} [N], or bool [N, L] for tasks of several labels, because a score is "
                "counted against them"
            ),
            fix=f"Add {LABELS} to the arrays",
        )
    queries = data.get(QUERIES)
    if queries is not None and queries.shape != (count,):
        raise CalibrationError(
            f"{reference}: {QUERIES} {queries.shape}",
            expected=f"[{count}]",
            fix="Give each row one number",
        )
    truths, wrong = {}, []
    for task in tasks:
        own = labels[places[task.name]]
        asked = None if queries is None else queries[places[task.name]]
        score = scores.get(task.name) or _usual(task, asked)
        if task.kind == "multi_label_classification" and own.ndim == 2:
            truths[task.name] = Truth(score, own[:, : len(task.labels)].astype(np.bool_), asked)
            continue
        found = [
            _label(_number(value.item()) if own.ndim == 1 else None, task, score) for value in own
        ]
        wrong += [
            f"{labels[place]!r} of task {task.name} (row {place + 1})"
            for place, label in zip(places[task.name], found, strict=True)
            if label is None
        ]
        kept = [label for label in found if label is not None]
        truths[task.name] = Truth(score, np.array(kept), asked)
    _refuse(wrong, reference)
    return truths


def _label(label: object, task: Task, score: str) -> float | int | list[bool] | None:
    """Return a row's label as ``scores.Answers`` has it; None where it is none of the task's."""
    if task.kind == "regression" or score == RANKING:
        if isinstance(label, bool) or not isinstance(label, int | float):
            return None
        return float(label) if np.isfinite(label) else None
    if task.kind == "multi_label_classification":
        if not isinstance(label, tuple):
            return None
        found = {_index(name, task) for name in label}
        return None if None in found else [place in found for place in range(len(task.labels))]
    return _index(label, task)


def _index(label: object, task: Task) -> int | None:
    if isinstance(label, str):
        return task.labels.index(label) if label in task.labels else None
    # JSON's true is no index, though Python's is 1.
    if isinstance(label, bool) or not isinstance(label, int):
        return None
    return label if 0 <= label < len(task.labels) else None


def _number(value: float) -> float:
    """Return what stands in an array: one of floats may hold indices beside numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _queries(queries: Sequence[object]) -> Array | None:
    """Return a number for each query, None where no row has one."""
    if all(query is None for query in queries):
        return None
    numbers = {query: place for place, query in enumerate(dict.fromkeys(queries))}
    return np.array([numbers[query] for query in queries])


def _usual(task: Task, queries: Array | None) -> str:
    return usual_score(task.kind) if queries is None else RANKING


def _refuse(wrong: Sequence[str], reference: str) -> None:
    if wrong:
        raise CalibrationError(
            f"{reference}: labels that the task does not have: {shortened(wrong)}",
            expected=(
                "the label's name or its index; a number for regression and ranking, because a "
                "row that is left out would not be counted"
            ),
            fix="Correct 'label' in these rows",
        )
