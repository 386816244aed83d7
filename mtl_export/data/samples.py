"""Data of any kind -> token arrays with task ids and labels, ready to be fed in batches.

Kinds of data, by what the reference names

    rows.jsonl            one JSON object a line, as ``data`` reads them
    folder/               its ``*.jsonl``; a row that names no task has its file's name as task
    arrays.npz            the model's inputs, ``task_ids`` and, if known, ``labels``: [N, ...]
    module:function       what the function returns: rows (objects as in JSONL), or a mapping
    path/file.py:function  of arrays as in an npz file

N rows, S tokens of the longest row.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.npz_file import read_npz
from mtl_export.checkpoint.model_inputs import PIXEL_VALUES
from mtl_export.checkpoint.tensors import Array
from mtl_export.data.rows import Row, balanced_indices, load_rows, refuse_unknown, row_of, tokenize
from mtl_export.errors import CalibrationError, shortened
from mtl_export.names import TASK_IDS

LABELS = "labels"
NO_LABEL = -1
QUERIES = "queries"
INPUT_IDS, MASK, TOKEN_TYPES = "input_ids", "attention_mask", "token_type_ids"
TEXT = (INPUT_IDS, MASK, TOKEN_TYPES)
_CALLABLE = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Samples:
    """Rows as the model takes them.

    Attributes:
        arrays: The model's inputs without ``task_ids``, each ``[N, ...]``.
        task_ids: int64 ``[N]``.
        labels: int64 ``[N]``, ``NO_LABEL`` where it is not known.
    """

    arrays: Mapping[str, Array]
    task_ids: Array
    labels: Array

    def __len__(self) -> int:
        """Return N."""
        return len(self.task_ids)

    def take(self, indices: Array) -> Samples:
        """Return some of the rows."""
        arrays = {name: value[indices] for name, value in self.arrays.items()}
        return Samples(arrays, self.task_ids[indices], self.labels[indices])

    def of_task(self, index: int) -> Samples:
        """Return the rows of one task, in order."""
        return self.take(np.flatnonzero(self.task_ids == index))

    def batches(self, size: int) -> Iterator[Samples]:
        """Yield all rows, short ones first, each batch cut to its own longest row."""
        order = np.argsort(self._lengths(), kind="stable")
        for begin in range(0, len(order), size):
            yield self.take(order[begin : begin + size])._cut()

    def sha256(self) -> str:
        """Return a hash of all values."""
        digest = hashlib.sha256()
        for name, value in sorted({**self.arrays, TASK_IDS: self.task_ids}.items()):
            digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def _lengths(self) -> Array:
        mask = self.arrays.get(MASK)
        if mask is None or mask.ndim != 2:
            return np.zeros(len(self), np.int64)
        # The place of the last token: rows may be padded on either side.
        lengths: Array = np.where(mask != 0, np.arange(1, mask.shape[1] + 1), 0).max(axis=1)
        return lengths

    def _cut(self) -> Samples:
        mask = self.arrays.get(MASK)
        if mask is None or mask.ndim != 2:
            return self
        longest = max(1, int(self._lengths().max()))
        arrays = {
            name: value[:, :longest] if value.shape[:2] == mask.shape else value
            for name, value in self.arrays.items()
        }
        return Samples(arrays, self.task_ids, self.labels)


@dataclass(frozen=True, slots=True)
class TaskCount:
    """How many rows a task brought.

    Attributes:
        available: Rows in the data.
        used: Different rows taken.
        fed: Rows fed; more than ``used`` where a small task's rows are taken again.
    """

    available: int
    used: int
    fed: int


def load_data(reference: str) -> list[Row] | dict[str, Array]:
    """Return what ``reference`` names: rows of text, or arrays.

    Raises:
        CalibrationError: It cannot be read, or is none of the kinds of data.
    """
    path = Path(reference)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise CalibrationError(
                f"{path}: no *.jsonl file",
                expected="one for each task or for all",
                fix="Pass a folder with JSONL files",
            )
        return [row for file in files for row in load_rows(file, file.stem)]
    if path.suffix == ".npz":
        return _arrays(path)
    match = None if path.is_file() else _CALLABLE.fullmatch(reference)
    if match:
        return _called(reference, match["place"], match["name"])
    return load_rows(path)


def open_samples(
    reference: str,
    tasks: Sequence[Task],
    tokenizer_folder: Path,
    *,
    max_length: int,
    per_task: int | None,
    seed: int,
) -> tuple[Samples, dict[str, TaskCount]]:
    """Return the data as samples, with the counts of each task by name.

    Args:
        reference: What ``load_data`` takes.
        tasks: The checkpoint's tasks; each needs at least one row.
        tokenizer_folder: Folder of the base model.
        max_length: Longer texts are cut to this many tokens.
        per_task: Rows of each task, chosen by ``seed``; None takes all.
        seed: Decides the choice.

    Raises:
        CalibrationError: The data cannot be used, or a task has none.
    """
    data = load_data(reference)
    owners = owners_of(data, tasks, reference)
    # One row each says whether a task has none, also where all rows are taken.
    chosen = balanced_indices(owners, tasks, per_task or 1, seed)
    if per_task is None:
        chosen = list(range(len(owners)))
    counts = {
        task.name: TaskCount(
            available=owners.count(task.name),
            used=len({index for index in chosen if owners[index] == task.name}),
            fed=sum(owners[index] == task.name for index in chosen),
        )
        for task in tasks
    }
    if isinstance(data, dict):
        return _from_arrays(data, reference).take(np.array(chosen)), counts
    rows = [data[index] for index in chosen]
    arrays = tokenize(rows, tokenizer_folder, tasks, max_length)
    task_ids = arrays.pop(TASK_IDS)
    return Samples(arrays, task_ids, _labels(rows, tasks, reference)), counts


def _labels(rows: Sequence[Row], tasks: Sequence[Task], reference: str) -> Array:
    known = {task.name: task.labels for task in tasks}
    counted = {task.name for task in tasks if task.kind == "single_label_classification"}
    labels, wrong = np.full(len(rows), NO_LABEL, np.int64), set()
    for place, row in enumerate(rows):
        names = known[row.task]
        # Tasks of several labels, or of none, are judged by their decisions here.
        if row.label is None or row.task not in counted or isinstance(row.label, tuple):
            continue
        if row.label in names:
            labels[place] = names.index(str(row.label))
        elif type(row.label) is int and 0 <= row.label < len(names):  # JSON's true is no index
            labels[place] = row.label
        else:
            wrong.add(f"{row.label!r} of task {row.task}")
    if wrong:
        raise CalibrationError(
            f"{reference}: labels that the checkpoint does not have: {shortened(sorted(wrong))}",
            expected="the label's name or its index, because accuracy is counted against them",
            fix="Correct 'label' in these rows, or leave it out",
        )
    return labels


def owners_of(
    data: list[Row] | dict[str, Array],
    tasks: Sequence[Task],
    reference: str,
    taken: Sequence[str] = (),
) -> list[str]:
    """Return the name of each row's task.

    Args:
        data: From ``load_data``.
        tasks: All tasks of the checkpoint.
        reference: Where the data come from, for messages.
        taken: What the model takes; nothing: text or images.

    Raises:
        CalibrationError: A row's task is unknown, or arrays are of unequal lengths or no inputs.
    """
    if not isinstance(data, dict):
        owners = [row.task for row in data]
        refuse_unknown(owners, tasks)
        return owners
    names = {task.index: task.name for task in tasks}
    ids = data.get(TASK_IDS)
    sizes = {name: value.shape[0] if value.ndim else 0 for name, value in data.items()}
    if ids is None or ids.ndim != 1 or ids.dtype.kind not in "iu" or len(set(sizes.values())) != 1:
        raise CalibrationError(
            f"{reference}: arrays "
            f"{', '.join(f'{name} {data[name].shape}' for name in sorted(data))}",
            expected=f"the model's inputs and int64 {TASK_IDS}, all with one row a sample",
            fix=f"Add {TASK_IDS} [N], or give all arrays as many rows",
        )
    inputs = (*(taken or (*TEXT, PIXEL_VALUES)), TASK_IDS)
    others = sorted(data.keys() - {*inputs, LABELS, QUERIES})
    if others:
        raise CalibrationError(
            f"{reference}: arrays that are no input: {shortened(others)}",
            expected=(
                f"some of {shortened(inputs, 20)}; {LABELS} and {QUERIES} where known, because an "
                "array that is not fed would change nothing"
            ),
            fix="Leave them out, or correct their names",
        )
    unknown = sorted({int(i) for i in ids} - names.keys())
    if unknown:
        raise CalibrationError(
            f"{reference}: task ids that the checkpoint does not have: "
            f"{shortened(map(str, unknown))}",
            expected=f"ids 0 to {len(tasks) - 1}",
            fix=f"Correct {TASK_IDS}",
        )
    return [names[int(i)] for i in ids]


def _from_arrays(data: Mapping[str, Array], reference: str) -> Samples:
    labels = data.get(LABELS)
    if labels is None:
        labels = np.full(len(data[TASK_IDS]), NO_LABEL, np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"{reference}: {LABELS} {labels.dtype} {labels.shape}",
            expected="int64 [N]",
            fix="Store each row's label index, or leave labels out",
        )
    inputs = {name: value for name, value in data.items() if name not in {TASK_IDS, LABELS}}
    return Samples(inputs, data[TASK_IDS].astype(np.int64), labels.astype(np.int64))


def _arrays(path: Path) -> dict[str, Array]:
    return read_npz(path, error=CalibrationError, fix="Pass an existing npz file")[1]


def _called(reference: str, place: str, name: str) -> list[Row] | dict[str, Array]:
    try:
        found: Any = getattr(_module(place), name)()
    except Exception as error:  # the user's own code may raise anything
        raise CalibrationError(
            f"{reference}: calling it raised {type(error).__name__}: {error}",
            expected="a function without arguments that returns rows or arrays",
            fix="Correct the function",
        ) from error
    if isinstance(found, Mapping):
        return _numeric(reference, found)
    rows = [value if isinstance(value, Row) else row_of(value) for value in _items(found)]
    problems = [f"row {place} {row}" for place, row in enumerate(rows) if isinstance(row, str)]
    if problems or not rows:
        raise CalibrationError(
            f"{reference}: {shortened(problems) if problems else 'no row'}",
            expected='a mapping of arrays, or objects such as {"task": "spam", "text": "Hi"}',
            fix="Correct what the function returns",
        )
    return [row for row in rows if isinstance(row, Row)]


def _numeric(reference: str, found: Mapping[Any, Any]) -> dict[str, Array]:
    """Return what a function gave as arrays of numbers."""
    arrays, others = {}, []
    for name, value in found.items():
        try:
            arrays[str(name)] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError):  # numpy's and torch's words for no array
            others.append(f"{name} is {type(value).__name__}")
    others += [f"{name} is {a.dtype}" for name, a in arrays.items() if a.dtype.kind not in "biuf"]
    if others:
        raise CalibrationError(
            f"{reference}: {shortened(others)}",
            expected="arrays of numbers",
            fix="Correct what the function returns",
        )
    return arrays


def _items(found: object) -> Iterable[object]:
    return found if isinstance(found, Iterable) and not isinstance(found, str) else ()


def _module(place: str) -> Any:
    """Import ``place``: a Python file, or a module that the current folder may hold."""
    path = Path(place)
    folder = str(path.parent.absolute()) if path.suffix == ".py" else str(Path.cwd())
    # Such a file imports its neighbours plainly, as a script does.
    sys.path.insert(0, folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their module up by name.
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(folder)
