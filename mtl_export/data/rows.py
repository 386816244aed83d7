"""JSONL rows -> token arrays that carry ``task_ids``, every task with the same weight.

One JSON object per line: ``{"task": name, "text": str, "text_pair": str, "label": ...}``,
``text_pair`` only for tasks that judge pairs, ``label`` where it is known: the label's name or
index, a list of such for tasks of several labels, a number for regression. Rows of one ``query``
are ranked against each other. Other keys are left alone.

N rows, S tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.checkpoint.files.tokenizer_file import TOKENIZER_FILE, tokenizer_document
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CalibrationError, MtlExportError, shortened
from mtl_export.names import TASK_IDS


@dataclass(frozen=True, slots=True)
class Row:
    """One input.

    Attributes:
        task: Name of its task.
        text: The text, or the first of a pair.
        text_pair: The second of a pair.
        label: Name or index of the right label, several of them, or a number; None where it is
            not known.
        query: What the row answers, for tasks that rank; None for others.
    """

    task: str
    text: str
    text_pair: str | None = None
    label: float | str | tuple[object, ...] | None = None
    query: int | str | None = None


def load_rows(path: Path, task: str | None = None) -> list[Row]:
    """Return the rows of the JSONL file ``path``, in order; empty lines are skipped.

    Args:
        path: The file.
        task: The task of rows that do not name one; None refuses such rows.

    Raises:
        CalibrationError: The file cannot be read, has no row, or a line is no row; every
            bad line is named.
    """
    try:
        # splitlines() would also cut at U+2028 and U+0085, which JSON allows inside a text.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path}: it cannot be read ({getattr(error, 'strerror', None) or error})",
            expected="a UTF-8 file with one JSON object per line",
            fix="Pass an existing JSONL file",
        ) from error
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(line, task)
            if isinstance(row, str):
                problems.append(f"line {number} {row}")
            else:
                rows.append(row)
    if problems or not rows:
        raise CalibrationError(
            f"{path}: {shortened(problems) if problems else 'no row'}",
            expected=(
                'lines such as {"task": "spam", "text": "Win a prize"}, because a row that is '
                "dropped would not be compared or calibrated on"
            ),
            fix="Correct these lines",
        )
    return rows


def tokenize(
    rows: Sequence[Row], tokenizer_folder: Path, tasks: Sequence[Task], max_length: int
) -> dict[str, Array]:
    """Return the rows as the model takes them, padded to the longest.

    Args:
        rows: At least one.
        tokenizer_folder: Folder of the base model.
        tasks: The checkpoint's tasks.
        max_length: Longer rows are cut to this many tokens.

    Returns:
        The tokenizer's arrays, int64 ``[N, S]``, and ``task_ids``, int64 ``[N]``.

    Raises:
        CalibrationError: A row's task is unknown, there is no row, or the folder has no
            usable tokenizer.
    """
    refuse_unknown([row.task for row in rows], tasks)
    if not rows:
        raise CalibrationError(
            "input rows: none", expected="at least one", fix="Pass a file with rows"
        )
    with _usable(tokenizer_folder):
        tokenizer = _tokenizer(tokenizer_folder)
        # One by one: pairs and single texts may be mixed, which no batch call takes.
        encoded = [
            dict(tokenizer(row.text, row.text_pair, truncation=True, max_length=max_length))
            for row in rows
        ]
        padded = tokenizer.pad(encoded, padding=True, return_tensors="np")
    ids = {task.name: task.index for task in tasks}
    arrays: dict[str, Array] = {
        name: np.asarray(value).astype(np.int64) for name, value in padded.items()
    }
    arrays[TASK_IDS] = np.array([ids[row.task] for row in rows], np.int64)
    return arrays


def balanced(rows: Sequence[Row], tasks: Sequence[Task], per_task: int, seed: int) -> list[Row]:
    """Return ``per_task`` rows of every task, the tasks taking turns.

    A task's rows are shuffled; where it has too few they are shuffled and taken again,
    so that every task weighs the same. A task's sample depends on its own rows, its name
    and the seed only: another task more does not change it.

    Args:
        rows: What to choose from.
        tasks: The checkpoint's tasks.
        per_task: How many rows each task gets, at least 1.
        seed: Decides the choice.

    Raises:
        CalibrationError: A row's task is unknown, a task has no row, or ``per_task`` < 1.
    """
    return [rows[index] for index in balanced_indices(
        [row.task for row in rows], tasks, per_task, seed
    )]  # fmt: skip


def balanced_indices(
    owners: Sequence[str], tasks: Sequence[Task], per_task: int, seed: int
) -> list[int]:
    """Return which rows ``balanced`` chooses, by position.

    Args:
        owners: Each row's task.
        tasks: The checkpoint's tasks.
        per_task: How many rows each task gets, at least 1.
        seed: Decides the choice.
    """
    refuse_unknown(owners, tasks)
    own = {
        task.name: [index for index, owner in enumerate(owners) if owner == task.name]
        for task in tasks
    }
    absent = [name for name, found in own.items() if not found]
    if absent or per_task < 1:
        given = f"no row for {shortened(absent)}" if absent else f"{per_task} rows per task"
        raise CalibrationError(
            f"calibration rows: {given}",
            expected=(
                "at least one row for each task, because ranges that a task did not take part in "
                "may cut its values off"
            ),
            fix="Add rows for these tasks" if absent else "Ask for at least one",
        )
    samples = [_sample(own[task.name], task.name, per_task, seed) for task in tasks]
    return [index for turn in zip(*samples, strict=True) for index in turn]


def _sample(rows: list[int], name: str, count: int, seed: int) -> list[int]:
    generator = np.random.default_rng([seed, *name.encode()])
    rounds = -(-count // len(rows))
    order = np.concatenate([generator.permutation(len(rows)) for _ in range(rounds)])
    return [rows[index] for index in order[:count]]


def _row(line: str, default_task: str | None) -> Row | str:
    """Return the row in ``line``, or what is wrong with it."""
    try:
        value = parse_json(line, "", object)
    except MtlExportError as error:
        return f"is {error.problem.removeprefix(': ')}"
    return row_of(value, default_task)


def row_of(value: object, default_task: str | None = None) -> Row | str:
    """Return the row that a JSON object is, or what is wrong with it."""
    if not isinstance(value, dict):
        return "is no JSON object"
    task, text, pair = value.get("task", default_task), value.get("text"), value.get("text_pair")
    if not isinstance(task, str) or not isinstance(text, str):
        return "has no text in 'task' and 'text'"
    if pair is not None and not isinstance(pair, str):
        return "has a 'text_pair' that is no text"
    label, query = value.get("label"), value.get("query")
    for name, value in (("label", label), ("query", query)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"has a {name!r} of {value.bit_length()} bits, more than 64"
    if isinstance(label, list):
        label = tuple(label)
    known = label if isinstance(label, int | float | str | tuple) else None
    return Row(task, text, pair, known, query if isinstance(query, int | str) else None)


def refuse_unknown(owners: Sequence[str], tasks: Sequence[Task]) -> None:
    """Refuse rows of tasks that the checkpoint does not have.

    Raises:
        CalibrationError: It names them.
    """
    known = [task.name for task in tasks]
    unknown = sorted(set(owners) - set(known))
    if unknown:
        raise CalibrationError(
            f"input rows: tasks that the checkpoint does not have: {shortened(unknown)}",
            expected=f"some of {shortened(known)}",
            fix="Correct 'task' in these rows",
        )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if (folder / TOKENIZER_FILE).is_file():
        tokenizer_document(folder / TOKENIZER_FILE)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so that its id does not matter
    return tokenizer


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Turn what transformers raises into our error: anything, and panics of Rust.

    Raises:
        CalibrationError: The folder has no tokenizer, or a broken one.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ImportError):
        raise
    except BaseException as error:  # a panic is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"{folder}: no tokenizer that transformers can load ({reason})",
            expected="tokenizer.json or vocab files beside the base's weights",
            fix="Add the base's tokenizer files to its folder",
        ) from error
