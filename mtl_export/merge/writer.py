"""Write tasks as standalone model folders, all of them in one pass over the base.

Nothing is loaded as a model; see ``stream`` for how, ``layout`` for what goes where.
A folder is what ``from_pretrained`` loads: weights, shard index, config, the base's
tokenizer and processor files, and ``merge-report.json`` (see ``drift``); a head that no
transformers class has lies beside it (see ``head_file``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import INDEX_FILE, companion_files
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.merge.drift import Squares, TaskDrift, sum_of
from mtl_export.merge.hashed_files import HashedPrefix
from mtl_export.merge.head_file import has_head_file, head_note, write_head
from mtl_export.merge.layout import DTYPES, Layout, MergeLayout, merge_layout, output_dtype
from mtl_export.merge.one_pass import Pass

REPORT_FILE = "merge-report.json"


@dataclass(frozen=True)
class MergeOptions:
    """What decides the bytes of merged folders, besides base, checkpoint and task.

    Attributes:
        dtype: ``fp32``, ``fp16`` or ``bf16``; None keeps each tensor's own.
        layout: ``standalone``, or ``shared``: tensors that no task changes are stored once.
        max_shard_bytes: Cut weight files at this size; None keeps the base's files.
        is_linked: Shared files are hard links in each folder; else they stay where they
            are and the folders' indexes point there.
    """

    dtype: str | None = None
    layout: MergeLayout = "standalone"
    max_shard_bytes: int | None = None
    is_linked: bool = True


@dataclass
class MergeState:
    """How far a merge is, and what it found.

    Attributes:
        files: By path, how much is written and the hash of that.
        squares: By task name and module, then by row, what was measured.
    """

    files: dict[Path, HashedPrefix] = field(default_factory=dict)
    squares: dict[tuple[str, str], dict[int, Squares]] = field(default_factory=dict)


Tick = Callable[[int, int, MergeState], None]


def layout_of(bound: BoundModel, tasks: Sequence[Task], options: MergeOptions) -> Layout:
    """Return the files that ``write_tasks`` would write."""
    return merge_layout(
        bound,
        tasks,
        dtype=options.dtype,
        layout=options.layout,
        max_shard_bytes=options.max_shard_bytes,
    )


def merged_size_bytes(bound: BoundModel, dtype: str | None) -> int:
    """Return about how many bytes one merged task takes on disk."""
    return sum(
        prod(tensor.shape) * NUMPY_DTYPES[output_dtype(tensor, dtype)].itemsize
        for tensor in bound.base.tensors.values()
    )


def write_merged(
    bound: BoundModel,
    task: Task,
    folder: Path,
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``task`` merged into the base as a folder that ``from_pretrained`` loads.

    Args:
        bound: The adapter and its base.
        task: The task to fold in.
        folder: An existing, empty folder.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None keeps each tensor's own.
        progress: Called with bytes done and bytes in all.

    Raises:
        BaseModelError: A weight is not finite in the output dtype.
    """
    layout = layout_of(bound, (task,), MergeOptions(dtype=dtype))

    def tick(done: int, total: int, written: MergeState) -> None:
        progress(done, total)

    written = write_tasks(bound, {task: folder}, layout, tick=tick)
    write_companions(bound, task, folder, layout, dtype=dtype)
    write_json(folder / REPORT_FILE, merge_report(bound, task, task_drift(layout, task, written)))


def write_tasks(
    bound: BoundModel,
    folders: Mapping[Task, Path],
    layout: Layout,
    *,
    shared: Path | None = None,
    resumed: MergeState | None = None,
    tick: Tick = lambda done, total, written: None,
) -> MergeState:
    """Write the weights of several tasks, reading the base once.

    The base's hash, if it is not known yet, is taken on the way and known afterwards.

    Args:
        bound: The adapter and its base.
        folders: The tasks to write, and an existing folder for each.
        layout: The files to write; may hold more tasks than ``folders``.
        shared: The folder for shared files; None leaves them out.
        resumed: What an earlier run with the same layout left there, checked by hash while
            it is taken up.
        tick: Called now and then with bytes done, bytes in all, and how far each file is.

    Returns:
        Every weight file with its hash, and what was measured.

    Raises:
        BaseModelError: A weight is not finite in the output dtype.
    """
    places = [(shared / file.name, file) for file in layout.shared] if shared else []
    places += [
        (folder / file.name, file)
        for task, folder in folders.items()
        for file in layout.own[task.name]
    ]
    before = resumed or MergeState()
    one_pass = Pass(bound, places, resumed=before.files, hash_base=not bound.base.is_hashed)
    one_pass.squares.update(before.squares)

    def written() -> MergeState:
        return MergeState(one_pass.progress(), one_pass.squares)

    one_pass.run(lambda done: tick(done, one_pass.total_bytes, written()))
    bound.base.remember_digests(one_pass.base_digests())
    return written()


def write_companions(
    bound: BoundModel,
    task: Task,
    folder: Path,
    layout: Layout,
    *,
    dtype: str | None = None,
    shared: str = "",
) -> None:
    """Write everything of a task's folder but weights and report.

    Args:
        bound: The adapter and its base.
        task: The task.
        folder: Its folder.
        layout: Its weight files.
        dtype: As in ``MergeOptions``.
        shared: Where the shared files lie, seen from ``folder``: "" or ending in "/".
    """
    write_json(folder / "config.json", task_config(bound, task, dtype))
    index = layout.index(task, shared)
    if index is not None:
        write_json(folder / INDEX_FILE, index)
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)
    pipeline = bound.pipeline
    if pipeline is not None:
        pipeline.write(folder)
    if has_head_file(bound, task):
        touched = bound.base_tensor(f"{next(iter(bound.adapters.layers))}.weight")
        write_head(bound, task, folder, output_dtype(touched, dtype))


def task_drift(layout: Layout, task: Task, written: MergeState) -> TaskDrift:
    """Return how far ``task`` moves each layer, as measured while it was written."""
    folded = [piece for file in layout.own[task.name] for piece in file.pieces if piece.task]
    layers = {}
    for piece in folded:
        blocks = written.squares.get((task.name, piece.module), {})
        # Threads bring the blocks in any order; sums must not depend on it.
        layers[piece.module] = sum_of(squares for _, squares in sorted(blocks.items()))
    return TaskDrift(task.name, ", ".join(sorted({piece.dtype for piece in folded})), layers)


def merge_report(bound: BoundModel, task: Task, drift: TaskDrift) -> dict[str, object]:
    """Return what ``merge-report.json`` says: the drift, and where the head is if not inside."""
    note = head_note(bound, task)
    return drift.as_dict() | ({"head": note} if note else {})


def task_config(bound: BoundModel, task: Task, dtype: str | None) -> dict[str, Any]:
    """Return ``config.json`` for a model that serves only ``task``.

    Args:
        bound: The adapter and its base.
        task: The task.
        dtype: As written; None keeps the base's word.
    """
    config = dict(bound.base.config)
    if bound.adapters.model_class:
        config["architectures"] = [bound.adapters.model_class]
    if task.labels:
        config["id2label"] = {str(index): label for index, label in enumerate(task.labels)}
        config["label2id"] = {label: index for index, label in enumerate(task.labels)}
        config["problem_type"] = task.kind
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = DTYPES[dtype][1]
    return config


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` so that equal documents are equal bytes."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
