"""Models and shapes -> latency, throughput, load time and memory, measured in turns.

Every subject lives in a fresh process of its own, which loads it, warms up and then times blocks
of calls when told to. Blocks take turns: in each round every subject has one, forwards and
backwards by turns, so that a machine that slows down or speeds up does so for all. Ratios are
medians over rounds of one block against the block of the same round.

    p50, p95   of all calls of all rounds, in milliseconds
    load       from the call that opens the model until it can be run
    before     resident memory of the process, its libraries imported, the model not yet opened
    peak       most resident memory until the end; PSS counts what processes share in proportion
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import ceil
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from mtl_export import errors
from mtl_export.bench.memory import peak_bytes, pss_bytes, within_memory
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, MtlExportError
from mtl_export.names import INPUT_IDS, TASK_IDS
from mtl_export.runtime.rows import Field

# A block is about as long as this, but has enough calls for LEAST_CALLS in all rounds.
BLOCK_S, LEAST_CALLS, MOST_CALLS = 0.5, 20, 200
WARM_CALLS = 3
# Phase of a call -> seconds of each step: {"forward": [t]}, or {"prefill": [t], "decode": [t, ...]}
Timings = dict[str, list[float]]
Call = Callable[[Mapping[str, Array]], Timings]


@dataclass(frozen=True)
class Opened:
    """A model that can be run.

    Attributes:
        call: Runs it on one batch and says how long each phase took.
        fields: The inputs it takes; None if it takes what the others do, and ``task_ids`` of
            every row.
    """

    call: Call
    fields: tuple[Field, ...] | None


class Candidate(Protocol):
    """What is measured. It is pickled, so it holds paths and numbers only."""

    @property
    def name(self) -> str:
        """Return its name, as tables print it."""
        ...

    def prepare(self) -> None:
        """Import the libraries it needs, in its own process."""
        ...

    def open(self) -> Opened:
        """Load the model, in its own process."""
        ...


@dataclass(frozen=True, slots=True)
class BatchShape:
    """One batch shape.

    Attributes:
        batch: Rows.
        sequence: Tokens of each.
    """

    batch: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}"


@dataclass(frozen=True)
class Timing:
    """One subject's times for one shape and phase.

    Attributes:
        subject: Its name.
        shape: The batch.
        phase: ``forward``, ``prefill`` or ``decode`` (one token of every row).
        blocks: Seconds of each call, by round.
        has_tokens: Whether its rows are of tokens; those of images are not.
    """

    subject: str
    shape: BatchShape
    phase: str
    blocks: tuple[tuple[float, ...], ...]
    has_tokens: bool = True

    @property
    def calls(self) -> tuple[float, ...]:
        """Return the seconds of every call."""
        return tuple(seconds for block in self.blocks for seconds in block)

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of all calls in milliseconds."""
        return float(np.percentile(self.calls, percent)) * 1e3

    @property
    def rows_per_s(self) -> float:
        """Return rows per second over all calls."""
        return self.shape.batch * len(self.calls) / sum(self.calls)

    @property
    def tokens_per_s(self) -> float | None:
        """Return tokens per second over all calls; a decoding step makes one for each row.

        None where rows have no tokens.
        """
        if not self.has_tokens:
            return None
        return self.rows_per_s * (1 if self.phase == "decode" else self.shape.sequence)

    def ratio_to(self, other: Timing) -> float:
        """Return the median over rounds of this block's median by the other's."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return median(median(own) / median(others) for own, others in pairs)


@dataclass(frozen=True)
class Footprint:
    """What one subject costs beside time.

    Attributes:
        subject: Its name.
        load_s: Seconds to open it.
        before_bytes: Resident memory before that, libraries imported.
        peak_bytes: Most resident memory until the end of the measurement.
        pss_bytes: Its proportional share of memory at the end; None where the system does not say.
    """

    subject: str
    load_s: float
    before_bytes: int
    peak_bytes: int
    pss_bytes: int | None


@dataclass(frozen=True)
class Measurement:
    """The result of one measurement.

    Attributes:
        timings: By shape, then phase, then subject.
        footprints: By subject.
    """

    timings: tuple[Timing, ...]
    footprints: tuple[Footprint, ...]

    def timing(self, subject: str, shape: BatchShape, phase: str) -> Timing | None:
        """Return the times of ``subject``, None if it was not measured so."""
        wanted = (subject, shape, phase)
        return next((t for t in self.timings if (t.subject, t.shape, t.phase) == wanted), None)


def measure(
    subjects: Sequence[Candidate],
    shapes: Sequence[BatchShape],
    inputs: Callable[[BatchShape, Sequence[Field]], Mapping[str, Array]],
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda step: None,
) -> Measurement:
    """Return the times and footprints of ``subjects`` on every shape.

    Args:
        subjects: At least one; their names differ.
        shapes: Batch shapes.
        inputs: Makes a batch of a shape for a graph with such inputs; the same values each time.
        rounds: How often each subject has its turn.
        progress: Told what is done next.

    Raises:
        MtlExportError: A subject could not be opened or run; what it raised.
        EngineRunError: Its process died, or memory ran out.
    """
    timings: list[Timing] = []
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            progress(f"load {subject.name}")
            workers.append(stack.enter_context(_worker(subject)))
        common = _with_tasks(next((w.fields for w in workers if w.fields is not None), ()))
        for shape in shapes:
            progress(f"measure {shape}")
            of_tokens = {}
            for worker in workers:
                fields = common if worker.fields is None else worker.fields
                of_tokens[worker.name] = any(field.name == INPUT_IDS for field in fields)
                with within_memory(f"shape {shape}"):
                    batch = inputs(shape, fields)
                worker.begin(batch, rounds)
            blocks: dict[tuple[str, str], list[tuple[float, ...]]] = {}
            for number in range(rounds):
                for worker in workers if number % 2 == 0 else reversed(workers):
                    for phase, seconds in worker.block().items():
                        blocks.setdefault((phase, worker.name), []).append(tuple(seconds))
            phases = list(dict.fromkeys(phase for phase, _ in blocks))
            timings += [
                Timing(name, shape, phase, tuple(blocks[phase, name]), has_tokens)
                for phase in phases
                for name, has_tokens in of_tokens.items()
                if (phase, name) in blocks
            ]
        footprints = tuple(worker.footprint() for worker in workers)
    return Measurement(tuple(timings), footprints)


def _with_tasks(fields: Sequence[Field]) -> tuple[Field, ...]:
    others = tuple(field for field in fields if field.name != TASK_IDS)
    return (*others, Field(TASK_IDS, ("batch",), "int64"))


def call_count(seconds: float, rounds: int) -> int:
    """Return how many calls of ``seconds`` a block has."""
    least = ceil(LEAST_CALLS / rounds)
    return min(max(ceil(BLOCK_S / max(seconds, 1e-6)), least), MOST_CALLS)


@dataclass
class _Worker:
    """The process of one subject, as its parent sees it."""

    name: str
    process: Any
    connection: Connection
    fields: tuple[Field, ...] | None = None
    load_s: float = 0.0
    before_bytes: int = 0
    _rounds: int = field(default=1, repr=False)

    def opened(self) -> None:
        self.fields, self.load_s, self.before_bytes = self._answer()

    def begin(self, batch: Mapping[str, Array], rounds: int) -> None:
        self._ask("begin", dict(batch), rounds)

    def block(self) -> Timings:
        timings: Timings = self._ask("block")
        return timings

    def footprint(self) -> Footprint:
        peak, pss = self._ask("memory")
        return Footprint(self.name, self.load_s, self.before_bytes, peak, pss)

    def _ask(self, *question: object) -> Any:
        self.connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise EngineRunError(
                f"{self.name}: its process ended with code {self.process.exitcode}",
                expected="a process that lives until it was measured; -9 is out of memory",
                fix="Measure fewer models or smaller shapes at once",
            ) from error
        if kind == "refused":
            name, parts = value
            raise getattr(errors, name)(**parts)
        if kind == "bug":
            raise RuntimeError(f"measuring {self.name}:\n{value}")
        return value


@contextmanager
def _worker(subject: Candidate) -> Iterator[_Worker]:
    # Neither fork nor forkserver: the child must not begin with the parent's memory.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, subject), daemon=True)
    process.start()
    theirs.close()
    worker = _Worker(subject.name, process, ours)
    try:
        worker.opened()
        yield worker
    finally:
        ours.close()  # what the child waits for
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, subject: Candidate) -> None:
    """Answer the parent until it hangs up; the child's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    try:
        for answer in _answers(connection, subject):
            connection.send(("done", answer))
    except (EOFError, ConnectionError):
        return
    except MtlExportError as error:
        parts = error.as_dict()
        connection.send(("refused", (parts.pop("error"), parts)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))


def _answers(connection: Connection, subject: Candidate) -> Iterator[object]:
    subject.prepare()
    before, begun = peak_bytes(), perf_counter()
    opened = subject.open()
    yield opened.fields, perf_counter() - begun, before
    batch: Mapping[str, Array] = {}
    calls = 1
    while True:
        question, *arguments = connection.recv()
        if question == "begin":
            batch, rounds = arguments
            with within_memory(subject.name):
                seconds = [sum(map(sum, opened.call(batch).values())) for _ in range(WARM_CALLS)]
            calls = call_count(min(seconds), rounds)
            yield None
        elif question == "block":
            opened.call(batch)  # after a pause caches are cold
            yield _merged(opened.call(batch) for _ in range(calls))
        else:
            yield peak_bytes(), pss_bytes()


def _merged(calls: Iterator[Timings]) -> Timings:
    merged: Timings = {}
    for call in calls:
        for phase, seconds in call.items():
            merged.setdefault(phase, []).extend(seconds)
    return merged
