"""Engine orders -> engines: longest first, several at a time, none lost to another's failure.

    orders ─ longest first ─┬─ worker: open its folder, build its files, rename it ─┐
                            └─ worker: ...                                        ┴─> outcomes

An order is one folder of engines. How a folder is opened (skipped if it is there already,
written next to its place and renamed) is the caller's business: the job enters the context
manager it is given, writes engines and their manifests, and leaves it, so that a killed job
has lost nothing but the folders that it was writing.

One worker builds in this process. Several workers have a process each, because a TensorRT
library has one logger and each build's messages must be kept apart. A process that dies
while it builds (the parser can abort on a graph, and the system kills what takes too much
memory) is an ``EngineBuildError`` of that engine; the next one gets a new process.

A folder may hold those of other orders (``engines/<task>`` in ``engines``). It is put in place
while nothing is being written inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

from mtl_export.child_process import ChildProcess
from mtl_export.errors import EngineBuildError, MtlExportError, UsageError
from mtl_export.tensorrt.callbacks import Progress
from mtl_export.tensorrt.differences import differing_weights
from mtl_export.tensorrt.manifest import EngineManifest, manifest_path
from mtl_export.tensorrt.options import BuildOptions
from mtl_export.tensorrt.refit import EngineBuilder


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
    """An order's result.

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


# Gives the folder to write to, None if the engines are there already.
OpenPlace: TypeAlias = Callable[[EngineOrder], AbstractContextManager[Path | None]]
# Writes the engine of a graph, and returns its manifest.
Build: TypeAlias = Callable[[Path, Path, BuildOptions, Progress], EngineManifest]


def with_changing_weights(orders: Sequence[EngineOrder]) -> list[EngineOrder]:
    """Return the orders of a job with refit, each graph with the weights that may change.

    These are the weights in which the graphs of its structure differ. A graph alone of its
    kind, such as the single graph next to per-task ones, is built without refit.

    Raises:
        EngineBuildError: A graph is quantised, or hides its weights.
        UsageError: No two graphs differ in weights.
    """
    names = differing_weights([part.onnx_path for one in orders for part in one.parts])
    if not any(names.values()):
        raise UsageError(
            "refit: there are no weights to change",
            expected="the graphs of several tasks that differ in weights",
            fix="Leave --refit out, or add --layout per-task",
        )

    def changing(part: EnginePart) -> EnginePart:
        own = names[part.onnx_path]
        return replace(part, options=replace(part.options, refit=bool(own), refittable=own))

    return [replace(one, parts=tuple(map(changing, one.parts))) for one in orders]


def run_job(
    orders: Sequence[EngineOrder],
    open_place: OpenPlace,
    *,
    library_name: str,
    jobs: int = 1,
    begin: Callable[[EngineOrder], None] = lambda order: None,
    reached: Callable[[float], None] = lambda share: None,
) -> list[EngineOutcome]:
    """Return what became of every order, in their order.

    Args:
        orders: What to build.
        open_place: Opens an order's folder; leaving the context puts it in place.
        library_name: ``tensorrt`` or ``tensorrt_rtx``.
        jobs: How many to build at a time; each takes the memory of one.
        begin: Called with each order that begins; workers call one at a time.
        reached: Called with the share of the work that is done, 0 to 1, likewise; folders
            found finished are no work.

    Raises:
        BackendMissingError: No TensorRT can build here.
    """
    count = max(1, min(jobs, len(orders)))
    work = _Job(orders, open_place, begin, reached)
    if count == 1:
        work.follow(EngineBuilder(library_name).build)
    else:
        processes = [ChildProcess(_died, EngineBuilder, library_name) for _ in range(count)]
        _in_processes(work, processes)
    return [work.outcomes[order.target] for order in orders]


def _build_in(process: ChildProcess) -> Build:
    """Return what has the process build, and waits for it."""

    def build(
        onnx_path: Path, engine_path: Path, options: BuildOptions, progress: Progress
    ) -> EngineManifest:
        values = (onnx_path, engine_path, options)
        manifest: EngineManifest = process.call("build", *values, hear=progress)
        return manifest

    return build


def _died(how: str) -> EngineBuildError:
    return EngineBuildError(
        f"the process that built its engine {how}",
        expected="a graph that the builder takes, and memory for its weights several times",
        fix="Rerun with -vv, and with --jobs 1 if memory may be short",
    )


def _in_processes(work: _Job, processes: Sequence[ChildProcess]) -> None:
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            followed = [pool.submit(work.follow, _build_in(process)) for process in processes]
            try:
                wait(followed, return_when=FIRST_EXCEPTION)
                for one in followed:
                    if one.done():
                        one.result()
            except BaseException:
                work.stop()
                for process in processes:
                    process.kill()
                raise
        for one in followed:
            one.result()
    finally:
        for process in processes:
            process.close()


class _Job:
    """Orders that workers take one by one; the arguments are those of ``run_job``."""

    def __init__(
        self,
        orders: Sequence[EngineOrder],
        open_place: OpenPlace,
        begin: Callable[[EngineOrder], None],
        reached: Callable[[float], None],
    ) -> None:
        self.outcomes: dict[Path, EngineOutcome] = {}
        parents = {parent for order in orders for parent in order.target.parents}
        self._outer = {order.target for order in orders} & parents
        self._waiting = sorted(orders, key=lambda order: order.size_bytes, reverse=True)
        self._open_place, self._begin, self._reached = open_place, begin, reached
        self._changed = threading.Condition()
        # How many inner folders are being written, and whether an outer one waits for them.
        self._inside, self._is_swapping = 0, False
        # share of each order that is done, of those that are work
        self._done = dict.fromkeys((order.target for order in orders), 0.0)
        self._sizes = {order.target: max(order.size_bytes, 1) for order in orders}

    def follow(self, build: Build) -> None:
        """Have ``build`` do orders until none is left."""
        while (order := self._next()) is not None:
            started = perf_counter()
            error, is_built = None, False
            try:
                is_built = self._do(order, build)
            except MtlExportError as failure:
                error = failure
            finally:
                with self._changed:
                    self._inside -= order.target not in self._outer
                    self._changed.notify_all()
            self._advance(order, 1.0 if is_built or error else None)
            seconds = perf_counter() - started
            self.outcomes[order.target] = EngineOutcome(order, is_built, error, seconds)

    def stop(self) -> None:
        """Let no worker begin another order."""
        with self._changed:
            self._waiting.clear()

    def _next(self) -> EngineOrder | None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_swapping)
            if not self._waiting:
                return None
            order = self._waiting.pop(0)
            self._begin(order)
            self._inside += order.target not in self._outer
            return order

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no inner folder is being written, and let none be begun in the block."""
        with self._changed:
            self._is_swapping = True
            self._changed.wait_for(lambda: not self._inside)
            try:
                yield
            finally:
                self._is_swapping = False
                self._changed.notify_all()

    def _do(self, order: EngineOrder, build: Build) -> bool:
        """Build ``order``; return whether there was anything to build."""
        with ExitStack() as until_placed, self._open_place(order) as folder:
            if folder is None:
                return False
            for index, part in enumerate(order.parts):

                def progress(phase: str, fraction: float, done: int = index) -> None:
                    self._advance(order, (done + fraction) / len(order.parts))

                path = folder / part.file
                build(part.onnx_path, path, part.options, progress).write(manifest_path(path))
            if order.target in self._outer:
                until_placed.enter_context(self._alone())
        return True

    def _advance(self, order: EngineOrder, share: float | None) -> None:
        """Report how much of the work is done; None: ``order`` was no work."""
        with self._changed:
            if share is None:
                del self._done[order.target]
            else:
                self._done[order.target] = share
            done = sum(share * self._sizes[target] for target, share in self._done.items())
            total = sum(self._sizes[target] for target in self._done)
            self._reached(done / total if total else 1.0)
