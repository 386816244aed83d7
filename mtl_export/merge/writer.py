"""Write tasks as standalone model folders, all of them in one pass over the base.

Nothing is loaded as a model; see ``stream`` for how, ``layout`` for what goes where.
A folder is what ``from_pretrained`` loads: weights, shard index, config, the base's
tokenizer and processor files, and ``merge-report.json`` (see ``drift``).
"""

from __future__ import annotations

import json
import os
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
from mtl_export.merge.drift import Squares, TaskDrift
from mtl_export.merge.lanes import Progress
from mtl_export.merge.layout import DTYPES, Layout, MergeLayout, merge_layout, output_dtype
from mtl_export.merge.stream import Pass

REPORT_FILE = "merge-report.json"
Tick = Callable[[int, int], None]


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
class Written:
    """How far a merge is, and what it found.

    Attributes:
        files: By path, how much is written and the hash of that.
        squares: By task name and module, then by row, what was measured.
    """

    files: dict[Path, Progress] = field(default_factory=dict)
    squares: dict[tuple[str, str], dict[int, Squares]] = field(default_factory=dict)


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
    progress: Tick = lambda done, total: None,
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
    options = MergeOptions(dtype=dtype)

    def tick(done: int, total: int, written: Written) -> None:
        progress(done, total)

    write_tasks(bound, {task: folder}, options=options, tick=tick)


def write_tasks(
    bound: BoundModel,
    folders: Mapping[Task, Path],
    *,
    options: MergeOptions = MergeOptions(),
    shared_folder: Path | None = None,
    resumed: Written | None = None,
    tick: Callable[[int, int, Written], None] = lambda done, total, written: None,
) -> tuple[Written, list[TaskDrift]]:
    """Write several tasks, reading the base once.

    Args:
        bound: The adapter and its base. If the base was not hashed yet, it is on the way.
        folders: The tasks to fold in, in id order, and an existing folder for each.
        options: What decides the bytes.
        shared_folder: Where shared files go: beside ``folders`` on the same disk.
        resumed: What an earlier run with the same arguments left there, checked by hash
            while it is taken up.
        tick: Called now and then with bytes done, bytes in all, and how far each file is.

    Returns:
        Every weight file with its hash, and the drift of each task.

    Raises:
        BaseModelError: A weight is not finite in the output dtype.
        ValueError: What ``resumed`` says is not what is there.
    """
    tasks = list(folders)
    layout = layout_of(bound, tasks, options)
    places = [(folders[t] / file.name, file) for t in tasks for file in layout.own[t.name]]
    if shared_folder is not None:
        places = [(shared_folder / file.name, file) for file in layout.shared] + places
    done = resumed or Written()
    one_pass = Pass(bound, places, resumed=done.files, hash_base=not bound.base.is_hashed)
    one_pass.squares.update(done.squares)

    def report() -> Written:
        return Written(one_pass.progress(), one_pass.squares)

    one_pass.run(lambda count: tick(count, one_pass.total_bytes, report()))
    bound.base.remember_digests(one_pass.base_digests())
    written = report()
    measured = one_pass.measured()
    drifts = [_drift(bound, layout, task, measured) for task in tasks]
    for task, drift in zip(tasks, drifts, strict=True):
        folder = folders[task]
        for file in layout.shared if shared_folder is not None and options.is_linked else ():
            _link(shared_folder / file.name, folder / file.name)  # type: ignore[operator]
            written.files[folder / file.name] = written.files[shared_folder / file.name]  # type: ignore[operator]
        _write_companions(bound, task, folder, layout, options, shared_folder)
        _write_json(folder / REPORT_FILE, drift.as_dict())
    return written, drifts


def task_config(
    bound: BoundModel, task: Task, dtype: str | None, *, untied: bool = False
) -> dict[str, Any]:
    """Return ``config.json`` for a model that serves only ``task``.

    Args:
        bound: The adapter and its base.
        task: The task.
        dtype: As written; None keeps the base's word.
        untied: The output embedding has a tensor of its own.
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
    if untied:
        config["tie_word_embeddings"] = False
    return config


def _drift(
    bound: BoundModel,
    layout: Layout,
    task: Task,
    measured: Mapping[tuple[str, str], Squares],
) -> TaskDrift:
    modules = [
        piece.module for file in layout.own[task.name] for piece in file.pieces if piece.task
    ]
    dtypes = {piece.dtype for file in layout.own[task.name] for piece in file.pieces if piece.task}
    return TaskDrift(
        task=task.name,
        dtype=", ".join(sorted(dtypes)),
        layers={
            module: measured[task.name, module]
            for module in modules
            if (task.name, module) in measured
        },
    )


def _write_companions(
    bound: BoundModel,
    task: Task,
    folder: Path,
    layout: Layout,
    options: MergeOptions,
    shared_folder: Path | None,
) -> None:
    """Write everything but the weights."""
    untied = any(
        piece.task is not None and _is_output_embedding(bound, piece.shape)
        for file in layout.own[task.name]
        for piece in file.pieces
    )
    config = task_config(bound, task, options.dtype, untied=untied)
    _write_json(folder / "config.json", config)
    where = "" if options.is_linked or shared_folder is None else f"../{shared_folder.name}/"
    index = layout.index(task, where)
    if index is not None:
        _write_json(folder / INDEX_FILE, index)
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)


def _is_output_embedding(bound: BoundModel, shape: tuple[int, ...]) -> bool:
    """Return whether a folded weight of this shape is the output embedding.

    Where the config ties it to the input embedding, ``from_pretrained`` would overwrite it.
    """
    sizes = {bound.base.config.get("vocab_size")}
    text = bound.base.config.get("text_config")
    if isinstance(text, dict):
        sizes.add(text.get("vocab_size"))
    return shape[0] in sizes


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copyfile(source, target)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
