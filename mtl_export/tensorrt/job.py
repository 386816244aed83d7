"""Engine orders -> engines: longest first, several at a time, none lost to another's failure.

    orders ─ longest first ─┬─ worker: open its folder, build its files, rename it ─┐
                            └─ worker: ...                                        ┴─> outcomes

An order is one folder of engines. How a folder is opened (skipped if it is there already,
written beside its place and renamed) is the caller's business: the job enters the context
manager it is given, writes engines and their manifests, and leaves it, so that a killed job
has lost nothing but the folders that it was writing.

One worker builds in this process. Several workers are processes, because a TensorRT library has
one logger and what is logged must be told apart by build. They are spawned, do nothing but
build, and end with the process that started them: building reports its progress, and fails
when nobody listens.

A folder may lie inside another order's (``engines/<task>`` in ``engines``). The outer one is
put in place while nothing is being written inside it: its worker waits for those that are at
it, and they for the swap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Protocol, TypeAlias

from mtl_export.errors import MtlExportError
from mtl_export.tensorrt.differences import differing_weights, refit_key
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.workers import EngineWorker, LocalWorker, WorkerProcess


@dataclass(frozen=True)
class EnginePart:
    """One engine of an order.

    Attributes:
        onnx_path: Its graph.
        file: The engine's file name.
        options: How to build it.
    """

    onnx_path: Path
    file: str
    options: BuildOptions


@dataclass(frozen=True)
class EngineOrder:
    """One folder of engines to build.

    Attributes:
        name: Its name for people.
        target: Where the folder will lie.
        parts: Its engines.
        size_bytes: About the size of their weights: how long they take, against others.
    """

    name: str
    target: Path
    parts: tuple[EnginePart, ...]
    size_bytes: int


@dataclass(frozen=True)
class EngineOutcome:
    """What became of an order.

    Attributes:
        order: The order.
        is_built: It was built now, not found finished.
        error: Why there are no engines; None if there are.
        seconds: How long it took.
    """

    order: EngineOrder
    is_built: bool
    error: MtlExportError | None
    seconds: float


class EngineFolder(Protocol):
    """An order's folder while it is open."""

    @property
    def folder(self) -> Path:
        """Return where to write."""

    @property
    def up_to_date(self) -> bool:
        """Return whether the engines are there already."""


OpenPlace: TypeAlias = Callable[[EngineOrder], AbstractContextManager[EngineFolder]]


class JobReport(Protocol):
    """Hears how the job goes; several workers may call, one at a time."""

    def begin(self, order: EngineOrder) -> None:
        """Hear that ``order`` begins."""

    def reached(self, share: float) -> None:
        """Hear what share of the work is done, 0 to 1; folders found finished are no work."""


def with_changing_weights(orders: Sequence[EngineOrder]) -> list[EngineOrder]:
    """Return the orders of a job with refit, each graph told which of its weights may change.

    These are the weights in which the graphs of its structure differ. A graph alone of its
    kind, such as the single graph beside per-task ones, is built without refit; where all
    are, nothing is changed here, and the builder refuses.

    Raises:
        EngineBuildError: A graph is quantised, or hides its weights.
    """
    alike: dict[str, list[Path]] = {}
    keys = {part.onnx_path: refit_key(part.onnx_path) for one in orders for part in one.parts}
    for path, key in keys.items():
        alike.setdefault(key, []).append(path)
    names = {key: differing_weights(paths) for key, paths in alike.items() if len(paths) > 1}
    if not names:
        return list(orders)

    def told(part: EnginePart) -> EnginePart:
        own = names.get(keys[part.onnx_path], ())
        return replace(part, options=replace(part.options, refit=bool(own), refittable=own))

    return [replace(one, parts=tuple(told(part) for part in one.parts)) for one in orders]


def run_job(
    orders: Sequence[EngineOrder],
    open_place: OpenPlace,
    *,
    library_name: str,
    jobs: int = 1,
    report: JobReport | None = None,
) -> list[EngineOutcome]:
    """Return what became of every order, in their order.

    Args:
        orders: What to build.
        open_place: Opens an order's folder; leaving the context puts it in place.
        library_name: ``tensorrt`` or ``tensorrt_rtx``.
        jobs: How many to build at a time; each takes the memory of one.
        report: Hears how it goes.

    Raises:
        BackendMissingError: No TensorRT can build here.
    """
    count = max(1, min(jobs, len(orders)))
    work = _Job(orders, open_place, report)
    if count == 1:
        work.follow(LocalWorker(library_name))
    else:
        _in_processes(work, [WorkerProcess(library_name) for _ in range(count)])
    return [work.outcomes[order.target] for order in orders]


def _in_processes(work: _Job, workers: Sequence[WorkerProcess]) -> None:
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            followed = [pool.submit(work.follow, worker) for worker in workers]
            try:
                wait(followed, return_when=FIRST_EXCEPTION)
                for one in followed:
                    if one.done():
                        one.result()
            except BaseException:
                work.stop()
                for worker in workers:
                    worker.kill()
                raise
        for one in followed:
            one.result()
    finally:
        for worker in workers:
            worker.close()


class _Job:
    """Orders that workers take one by one.

    Args:
        orders: All of them.
        open_place: As for ``run_job``.
        report: As for ``run_job``.
    """

    def __init__(
        self, orders: Sequence[EngineOrder], open_place: OpenPlace, report: JobReport | None
    ) -> None:
        self.outcomes: dict[Path, EngineOutcome] = {}
        self._waiting = sorted(orders, key=lambda order: order.size_bytes, reverse=True)
        targets = [order.target for order in orders]
        self._outer = {
            target for target in targets if any(target in other.parents for other in targets)
        }
        self._open_place, self._gate = open_place, _Gate()
        self._report, self._lock = report, threading.Lock()
        # share of each order that is done, of those that are work
        self._done = dict.fromkeys(targets, 0.0)
        self._sizes = {order.target: max(order.size_bytes, 1) for order in orders}

    def follow(self, worker: EngineWorker) -> None:
        """Do orders in ``worker`` until none is left."""
        while (order := self._next()) is not None:
            started = perf_counter()
            error, is_built = None, False
            try:
                is_built = self._do(order, worker)
            except MtlExportError as failure:
                error = failure
            self._advance(order, 1.0 if is_built or error else None)
            seconds = perf_counter() - started
            self.outcomes[order.target] = EngineOutcome(order, is_built, error, seconds)

    def stop(self) -> None:
        """Let no worker begin another order."""
        with self._lock:
            self._waiting.clear()

    def _next(self) -> EngineOrder | None:
        with self._lock:
            order = self._waiting.pop(0) if self._waiting else None
            if order is not None and self._report is not None:
                self._report.begin(order)
            return order

    def _do(self, order: EngineOrder, worker: EngineWorker) -> bool:
        """Build ``order``; return whether there was anything to build."""
        is_outer = order.target in self._outer
        with self._gate.held(is_outer) as before_swap, self._open_place(order) as place:
            if place.up_to_date:
                return False
            for index, part in enumerate(order.parts):

                def progress(phase: str, fraction: float, done: int = index) -> None:
                    self._advance(order, (done + fraction) / len(order.parts))

                path = place.folder / part.file
                worker.build(part.onnx_path, path, options=part.options, progress=progress)
            before_swap()
        return True

    def _advance(self, order: EngineOrder, share: float | None) -> None:
        """Report how much of the work is done; None: ``order`` was no work."""
        with self._lock:
            if share is None:
                del self._done[order.target]
            else:
                self._done[order.target] = share
            if self._report is None:
                return
            done = sum(share * self._sizes[target] for target, share in self._done.items())
            total = sum(self._sizes[target] for target in self._done)
            self._report.reached(done / total if total else 1.0)


class _Gate:
    """Keeps a folder from being swapped while others are written inside it, and back."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_swapping = False

    @contextmanager
    def held(self, is_outer: bool) -> Iterator[Callable[[], None]]:
        """Give what is to be called when the block is about to put its folder in place."""
        swapping = False

        def swap() -> None:
            nonlocal swapping
            with self._changed:
                self._changed.wait_for(lambda: not self._is_swapping)
                self._is_swapping = swapping = True
                self._changed.wait_for(lambda: not self._inside)

        with self._changed:
            if not is_outer:
                self._changed.wait_for(lambda: not self._is_swapping)
                self._inside += 1
        try:
            yield swap if is_outer else lambda: None
        finally:
            with self._changed:
                if swapping:
                    self._is_swapping = False
                if not is_outer:
                    self._inside -= 1
                self._changed.notify_all()
