"""Merged tasks as output folders: one pass over the base, then each folder put in place.

    <parent>/<task>/           one model folder per task
    <parent>/_shared/<id>/     tensors that no task changes, if they are referenced, not linked

Weights are written to a work folder beside them, with a journal of how much of each file
is there and the hash of that. A killed run leaves the work folder; ``resume`` takes it up
after the journal's hashes were found to hold. All folders are put in place at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from mtl_export.adapters.binding import BoundModel, check_base_hash
from mtl_export.bundle.manifest import FileEntry, Recipe
from mtl_export.bundle.output import OutputPlan, output_folder
from mtl_export.bundle.shared import (
    SHARED_FOLDER,
    SharedFiles,
    is_whole,
    remove_unused,
    whole_files,
)
from mtl_export.bundle.staging import resumable_folder
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.files.json_file import Shape, json_or_none, read_json
from mtl_export.merge.drift import Squares, TaskDrift
from mtl_export.merge.hashed_files import HashedPrefix
from mtl_export.merge.layout import Layout
from mtl_export.merge.verify import verify_task
from mtl_export.merge.writer import (
    REPORT_FILE,
    MergeOptions,
    MergeState,
    layout_of,
    merge_report,
    task_drift,
    write_companions,
    write_json,
    write_tasks,
)
from mtl_export.version import VERSION

JOURNAL_FILE = "journal.json"
JOURNAL_EVERY_S = 2.0
_JOURNAL: Shape = {"key": str, "files": {str: [object]}, "squares": [[object]]}


@dataclass(frozen=True)
class MergedTask:
    """One task's result.

    Attributes:
        task: The task.
        plan: Its output folder, in place when ``merge_tasks`` has returned.
        drift: What was measured; None where the folder was up to date.
        report: What its ``merge-report.json`` says.
        verified_count: Elements that were read again and compared.
        is_restored: The folder was up to date, but the shared files it refers to were not
            there or not whole, and were written again.
    """

    task: Task
    plan: OutputPlan
    drift: TaskDrift | None
    report: Mapping[str, Any]
    verified_count: int = 0
    is_restored: bool = False


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
    results = _merged(request, tick)
    # Also where nothing was to do: a run that was killed may have left what nobody refers to.
    remove_unused(request.parent)
    return results


def _merged(request: MergeRequest, tick: Callable[[int, int], None]) -> list[MergedTask]:
    layout = layout_of(request.bound, request.tasks, request.options)
    with ExitStack() as stack:
        journal = stack.enter_context(_journal(request))
        plans = _plans(request, layout, stack)
        todo = [task for task in request.tasks if not plans[task.name].up_to_date]
        shared = _shared_there(request, layout, plans)
        is_lost = bool(layout.shared) and shared is None
        if not todo and not is_lost:
            return _results(request, layout, plans, MergeState(), shared, {})
        work = {task.name: journal.folder / task.name for task in todo}
        written = _write(request, layout, journal, work, tick, with_shared=is_lost)
        if is_lost:
            shared = _shared_written(layout, journal.folder / SHARED_FOLDER, written)
        results = _results(request, layout, plans, written, shared, work, is_restored=is_lost)
        if is_lost and shared is not None and not request.options.is_linked:
            _place_shared(request, shared, written, stack)
        for result in results:
            if not result.plan.up_to_date:
                _fill(request, layout, result, work[result.task.name], shared, written)
    return results


def _plans(request: MergeRequest, layout: Layout, stack: ExitStack) -> dict[str, OutputPlan]:
    """Return the tasks' folders by name; they are put in place when ``stack`` ends."""
    # Entered last is put in place first: shared tensors later, now the tasks, last id first.
    return {
        task.name: stack.enter_context(
            output_folder(
                request.parent / task.name,
                recipe=lambda name=task.name: request.recipe(name),  # type: ignore[misc]
                force=request.force,
                estimated_size_bytes=layout.size_bytes,
            )
        )
        for task in reversed(request.tasks)
    }


def _shared_there(
    request: MergeRequest, layout: Layout, plans: Mapping[str, OutputPlan]
) -> SharedFiles | None:
    """Return the shared files if a task that is up to date has them whole."""
    if not layout.shared:
        return None
    done = [plans[t.name].folder for t in request.tasks if plans[t.name].up_to_date]
    names = [file.name for file in layout.shared]
    return whole_files(done, names, is_linked=request.options.is_linked)


def _shared_written(layout: Layout, folder: Path, written: MergeState) -> SharedFiles:
    names = [file.name for file in layout.shared]
    return SharedFiles(folder, {name: _entry(written.files[folder / name]) for name in names})


def _write(
    request: MergeRequest,
    layout: Layout,
    journal: _Journal,
    work: Mapping[str, Path],
    tick: Callable[[int, int], None],
    *,
    with_shared: bool,
) -> MergeState:
    """Write weights to the work folder, and find out that the base is the right one."""
    before = journal.read()
    shared = journal.folder / SHARED_FOLDER if with_shared else None
    for folder in (*work.values(), *([shared] if shared else [])):
        folder.mkdir(exist_ok=True)

    def keep(done: int, total: int, written: MergeState) -> None:
        journal.keep(written)
        tick(done, total)

    folders = {task: work[task.name] for task in request.tasks if task.name in work}
    written = write_tasks(request.bound, folders, layout, shared=shared, resumed=before, tick=keep)
    check_base_hash(request.bound)
    return written


def _results(
    request: MergeRequest,
    layout: Layout,
    plans: Mapping[str, OutputPlan],
    written: MergeState,
    shared: SharedFiles | None,
    work: Mapping[str, Path],
    *,
    is_restored: bool = False,
) -> list[MergedTask]:
    """Return the tasks in id order; all of them are verified if that is asked for."""
    results = []
    for task in request.tasks:
        plan, count = plans[task.name], 0
        if request.verify:
            folder = work.get(task.name, plan.folder)
            has_own = shared is None or (plan.up_to_date and request.options.is_linked)
            beside = shared.folder if shared is not None and not has_own else folder
            count = verify_task(request.bound, task, layout, folder, beside)
        if plan.up_to_date:
            report = read_json(plan.folder / REPORT_FILE, fix="Run merge again with --force")
            results.append(MergedTask(task, plan, None, report, count, is_restored))
        else:
            drift = task_drift(layout, task, written)
            report = merge_report(request.bound, task, drift)
            results.append(MergedTask(task, plan, drift, report, count))
    return results


def _place_shared(
    request: MergeRequest, shared: SharedFiles, written: MergeState, stack: ExitStack
) -> None:
    """Have the shared files in place when ``stack`` ends, unless the same lie there already."""
    place = request.parent / shared.name
    if not is_whole(place, shared.files):
        plan = stack.enter_context(
            output_folder(place, recipe=lambda: request.recipe(SHARED_FOLDER), force=request.force)
        )
        _move(shared.folder, written, plan)


def _fill(
    request: MergeRequest,
    layout: Layout,
    result: MergedTask,
    work: Path,
    shared: SharedFiles | None,
    written: MergeState,
) -> None:
    """Move one task's files to where its output folder is staged, and add what belongs there."""
    plan = result.plan
    _move(work, written, plan)
    options = request.options
    reference = ""
    if shared is not None and options.is_linked:
        for name, entry in shared.files.items():
            _link(shared.folder / name, plan.folder / name)
            plan.known[name] = entry
    elif shared is not None:
        reference = shared.reference
        plan.beside.update(shared.beside)
    write_companions(
        request.bound, result.task, plan.folder, layout, dtype=options.dtype, shared=reference
    )
    write_json(plan.folder / REPORT_FILE, result.report)


def _move(folder: Path, written: MergeState, plan: OutputPlan) -> None:
    for path, progress in written.files.items():
        if path.parent == folder:
            os.rename(path, plan.folder / path.name)
            plan.known[path.name] = _entry(progress)


def _entry(progress: HashedPrefix) -> FileEntry:
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

    def read(self) -> MergeState:
        """Return what the journal says, nothing if there is none."""
        document = _document(self.folder)
        if document is None:
            return MergeState()
        try:
            files = {
                self.folder / name: HashedPrefix(int(done), str(digest))
                for name, (done, digest) in document["files"].items()
            }
            squares = {
                (task, module): {int(row): Squares(*values) for row, values in blocks.items()}
                for task, module, blocks in document["squares"]
            }
        except (TypeError, ValueError, AttributeError, OverflowError):
            return MergeState()  # not what ``keep`` wrote: everything is written again
        return MergeState(files, squares)

    def keep(self, written: MergeState) -> None:
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
    document: dict[str, Any] | None = json_or_none(folder / JOURNAL_FILE, _JOURNAL)
    return document


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
    base = bound.base
    stats = [(n, f.stat()) for n, f in zip(base.file_names, base.weight_files, strict=True)]
    parts = {
        "version": VERSION,
        "checkpoint": bound.checkpoint.sha256,
        "hyper": {module: dict(layer.hyper) for module, layer in bound.checkpoint.layers.items()},
        "tasks": [task.name for task in request.tasks],
        "options": asdict(request.options),
        "base": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
