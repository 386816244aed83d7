"""Merged tasks as output folders: one pass over the base, then each folder put in place.

    <parent>/<task>/       one model folder per task
    <parent>/_shared/      tensors that no task changes, if they are referenced, not linked

Weights are written to a work folder beside them, with a journal of how much of each file
is there and the hash of that. A killed run leaves the work folder; ``resume`` takes it up
after the journal's hashes were found to hold. All folders are put in place at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from mtl_export.adapters.binding import BoundModel, check_base_hash
from mtl_export.bundle.manifest import FileEntry, Recipe
from mtl_export.bundle.output import OutputPlan, output_folder
from mtl_export.bundle.staging import resumable_folder
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.merge.drift import Squares, TaskDrift
from mtl_export.merge.lanes import Progress
from mtl_export.merge.layout import Layout
from mtl_export.merge.verify import verify_task
from mtl_export.merge.writer import (
    REPORT_FILE,
    MergeOptions,
    Written,
    layout_of,
    merge_report,
    task_drift,
    write_companions,
    write_json,
    write_tasks,
)
from mtl_export.version import VERSION

# No task can have this name: task names begin with a letter or digit.
SHARED_FOLDER = "_shared"
JOURNAL_FILE = "journal.json"
JOURNAL_EVERY_S = 2.0


@dataclass(frozen=True)
class MergedTask:
    """One task's result.

    Attributes:
        task: The task.
        plan: Its output folder, in place when ``merge_tasks`` has returned.
        drift: What was measured; None where the folder was up to date.
        verified_count: Elements that were read again and compared.
    """

    task: Task
    plan: OutputPlan
    drift: TaskDrift | None
    verified_count: int = 0


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, where to, and how carefully.

    Attributes:
        bound: The adapter and its base.
        tasks: The tasks, in id order.
        parent: The folder that gets one folder per task.
        options: What decides the bytes.
        recipe: Returns a folder's recipe from its name and the options that are its own;
            asks for the base's hash, so it is called late.
        force: Replace old results that are different.
        resume: Take up what a killed run of the same request left.
        verify: Read everything again and compare it with base + delta.
    """

    bound: BoundModel
    tasks: Sequence[Task]
    parent: Path
    options: MergeOptions
    recipe: Callable[[str], Recipe]
    force: bool = False
    resume: bool = False
    verify: bool = False


def merge_tasks(
    request: MergeRequest, tick: Callable[[int, int], None] = lambda done, total: None
) -> list[MergedTask]:
    """Merge all tasks of ``request``; they are in place when this returns.

    Args:
        request: What to do.
        tick: Called now and then with bytes done and bytes in all.

    Raises:
        OutputError: A folder exists and differs, or cannot be written, or the disk is full.
        BaseModelError: A weight is not finite in the output dtype.
        IntegrityError: The base is not the one the checkpoint was trained on, or ``verify``
            found a difference.
    """
    layout = layout_of(request.bound, request.tasks, request.options)
    with ExitStack() as stack:
        journal = stack.enter_context(_journal(request))
        plans = _plans(request, layout, stack)
        todo = [task for task in request.tasks if not plans[task.name].up_to_date]
        if not todo:
            return [MergedTask(task, plans[task.name], None) for task in request.tasks]
        before = journal.read()
        folders = {task: journal.folder / task.name for task in todo}
        shared = journal.folder / SHARED_FOLDER if layout.shared else None
        for folder in (*folders.values(), *([shared] if shared else [])):
            folder.mkdir(exist_ok=True)

        def keep(done: int, total: int, written: Written) -> None:
            journal.keep(written)
            tick(done, total)

        written = write_tasks(
            request.bound, folders, layout, shared=shared, resumed=before, tick=keep
        )
        check_base_hash(request.bound)
        counts = {
            task.name: verify_task(request.bound, task, layout, folder, shared or folder)
            for task, folder in folders.items()
            if request.verify
        }
        drifts = {task.name: task_drift(layout, task, written) for task in todo}
        for task, folder in folders.items():
            _fill(request, layout, task, folder, shared, written, plans[task.name])
            report = merge_report(request.bound, task, drifts[task.name])
            write_json(plans[task.name].folder / REPORT_FILE, report)
        if shared is not None and not request.options.is_linked:
            _move(shared, written, plans[SHARED_FOLDER])
        return [
            MergedTask(task, plans[task.name], drifts.get(task.name), counts.get(task.name, 0))
            for task in request.tasks
        ]


def _plans(request: MergeRequest, layout: Layout, stack: ExitStack) -> dict[str, OutputPlan]:
    """Return the output folders by name; they are put in place when ``stack`` ends."""
    # Entered last is put in place first: shared tensors, then the tasks in id order.
    names = [task.name for task in reversed(request.tasks)]
    if layout.shared and not request.options.is_linked:
        names.append(SHARED_FOLDER)
    plans = {}
    for name in names:
        plans[name] = stack.enter_context(
            output_folder(
                request.parent / name,
                recipe=lambda name=name: request.recipe(name),  # type: ignore[misc]
                force=request.force,
                estimated_size_bytes=layout.size_bytes,
            )
        )
    return plans


def _fill(
    request: MergeRequest,
    layout: Layout,
    task: Task,
    folder: Path,
    shared: Path | None,
    written: Written,
    plan: OutputPlan,
) -> None:
    """Move one task's files to where its output folder is staged, and add what belongs there."""
    _move(folder, written, plan)
    options = request.options
    reference = ""
    if shared is not None and options.is_linked:
        for file in layout.shared:
            _link(shared / file.name, plan.folder / file.name)
            plan.known[file.name] = _entry(written.files[shared / file.name])
    elif shared is not None:
        reference = f"../{SHARED_FOLDER}/"
    write_companions(
        request.bound, task, plan.folder, layout, dtype=options.dtype, shared=reference
    )


def _move(folder: Path, written: Written, plan: OutputPlan) -> None:
    for path, progress in written.files.items():
        if path.parent == folder:
            os.rename(path, plan.folder / path.name)
            plan.known[path.name] = _entry(progress)


def _entry(progress: Progress) -> FileEntry:
    return FileEntry(progress.sha256, progress.done_bytes)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copyfile(source, target)


class _Journal:
    """The work folder and how much of each file in it is written.

    Args:
        make: Returns the work folder.
        key: What the request is; another request's journal is not read.
    """

    def __init__(self, make: Callable[[], Path], key: str) -> None:
        self._make = make
        self._key = key
        self._next_s = 0.0

    @property
    def folder(self) -> Path:
        """Return the work folder."""
        return self._make()

    def read(self) -> Written:
        """Return what the journal says, nothing if there is none."""
        document = _document(self.folder)
        if document is None:
            return Written()
        files = {
            self.folder / name: Progress(int(done), str(digest))
            for name, (done, digest) in document["files"].items()
        }
        squares = {
            (task, module): {int(row): Squares(*values) for row, values in blocks.items()}
            for task, module, blocks in document["squares"]
        }
        return Written(files, squares)

    def keep(self, written: Written) -> None:
        """Write down how far things are, if the last time is a while ago."""
        if monotonic() < self._next_s:
            return
        self._next_s = monotonic() + JOURNAL_EVERY_S
        document = {
            "key": self._key,
            "files": {
                path.relative_to(self.folder).as_posix(): [progress.done_bytes, progress.sha256]
                for path, progress in written.files.items()
            },
            "squares": [
                [task, module, {row: list(asdict(s).values()) for row, s in list(blocks.items())}]
                for (task, module), blocks in list(written.squares.items())
            ],
        }
        partial = self.folder / f"{JOURNAL_FILE}.partial"
        partial.write_text(json.dumps(document), encoding="utf-8")
        os.replace(partial, self.folder / JOURNAL_FILE)


def _document(folder: Path) -> dict[str, Any] | None:
    try:
        document = json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


@contextmanager
def _journal(request: MergeRequest) -> Iterator[_Journal]:
    """Give the work folder: a killed run's, if it is to be taken up and is of this request."""
    key = _key(request)

    def is_wanted(folder: Path) -> bool:
        document = _document(folder)
        return request.resume and document is not None and document.get("key") == key

    target = request.parent.absolute().resolve() / "merge"
    with resumable_folder(target, is_wanted) as make:
        yield _Journal(make, key)


def _key(request: MergeRequest) -> str:
    """Return what tells requests apart; the base by size and time, for its hash comes late."""
    bound = request.bound
    stats = [(file.name, file.stat()) for file in bound.base.weight_files]
    parts = {
        "version": VERSION,
        "checkpoint": bound.checkpoint.sha256,
        "hyper": {module: dict(layer.hyper) for module, layer in bound.checkpoint.layers.items()},
        "tasks": [task.name for task in request.tasks],
        "options": asdict(request.options),
        "base": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
