"""Models and shapes -> latency, throughput, load time and memory, measured in turns.

Every subject lives in a fresh process of its own, which loads it, warms up and then times blocks
of calls on demand. Blocks take turns: in each round every subject has one, forwards and
backwards by turns, so that a machine that slows down or speeds up does so for all. Ratios are
medians over rounds of one block against the block of the same round.

    p50, p95   of all calls of all rounds, in milliseconds
    load       from the call that opens the model until it can be run
    before     resident memory of the process, its libraries imported, the model not yet opened
    peak       most resident memory until the end; PSS counts what processes share in proportion
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.child_process import ChildProcess
from mtl_export.errors import EngineRunError, MtlExportError
from mtl_export.names import INPUT_IDS, TASK_IDS
from mtl_export.runtime.rows import Field

# A block is about as long as this, but has enough calls for LEAST_CALLS in all rounds.
BLOCK_S, LEAST_CALLS, MOST_CALLS = 0.5, 20, 200
WARM_CALLS = 3
# What numpy, ONNX Runtime, PyTorch and CUDA say.
OUT_OF_MEMORY = ("unable to allocate", "failed to allocate", "can't allocate", "out of memory")
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
    """A model to measure. It is pickled, so it holds paths and numbers only."""

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
    """The memory and loading time of one subject.

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
        processes: dict[str, ChildProcess] = {}
        opened: dict[str, tuple[tuple[Field, ...] | None, float, int]] = {}
        for subject in subjects:
            progress(f"load {subject.name}")
            process = processes[subject.name] = _child(subject)
            stack.callback(process.close)
            opened[subject.name] = process.call("opened")
        common = next((own for own, *_ in opened.values() if own is not None), ())
        common = (
            *(field for field in common if field.name != TASK_IDS),
            Field(TASK_IDS, ("batch",), "int64"),
        )
        for shape in shapes:
            progress(f"measure {shape}")
            of_tokens = {}
            for name, (own, *_) in opened.items():
                fields = common if own is None else own
                of_tokens[name] = any(field.name == INPUT_IDS for field in fields)
                with within_memory(f"shape {shape}"):
                    batch = dict(inputs(shape, fields))
                processes[name].call("begin", batch, rounds)
            blocks: dict[tuple[str, str], list[tuple[float, ...]]] = {}
            for number in range(rounds):
                for name in processes if number % 2 == 0 else reversed(processes):
                    for phase, seconds in processes[name].call("block").items():
                        blocks.setdefault((phase, name), []).append(tuple(seconds))
            phases = list(dict.fromkeys(phase for phase, _ in blocks))
            timings += [
                Timing(name, shape, phase, tuple(blocks[phase, name]), has_tokens)
                for phase in phases
                for name, has_tokens in of_tokens.items()
                if (phase, name) in blocks
            ]
        footprints = tuple(
            Footprint(name, load_s, before_bytes, *processes[name].call("memory"))
            for name, (_, load_s, before_bytes) in opened.items()
        )
    return Measurement(tuple(timings), footprints)


def call_count(seconds: float, rounds: int) -> int:
    """Return how many calls of ``seconds`` a block has."""
    least = ceil(LEAST_CALLS / rounds)
    return min(max(ceil(BLOCK_S / max(seconds, 1e-6)), least), MOST_CALLS)


def _child(subject: Candidate) -> ChildProcess:
    def died(how: str) -> EngineRunError:
        return EngineRunError(
            f"{subject.name}: its process {how}",
            expected="a process that lives until it was measured; SIGKILL is out of memory",
            fix="Measure fewer models or smaller shapes at once",
        )

    return ChildProcess(died, _Turns, subject)


class _Turns:
    """One subject, loaded, in its own process."""

    def __init__(self, subject: Candidate) -> None:
        subject.prepare()
        self._name, self._before, begun = subject.name, peak_bytes(), perf_counter()
        self._opened = subject.open()
        self._load_s = perf_counter() - begun
        self._batch: Mapping[str, Array] = {}
        self._calls = 1

    def opened(self) -> tuple[tuple[Field, ...] | None, float, int]:
        """Return its inputs, the seconds it took to load, and the memory taken before."""
        return self._opened.fields, self._load_s, self._before

    def begin(self, batch: Mapping[str, Array], rounds: int) -> None:
        """Warm up on a batch, and find how many calls of it make a block."""
        self._batch = batch
        with within_memory(self._name):
            seconds = [sum(map(sum, self._opened.call(batch).values())) for _ in range(WARM_CALLS)]
        self._calls = call_count(min(seconds), rounds)

    def block(self) -> Timings:
        """Return the seconds of every call of one block."""
        self._opened.call(self._batch)  # after a pause caches are cold
        merged: Timings = {}
        for _ in range(self._calls):
            for phase, seconds in self._opened.call(self._batch).items():
                merged.setdefault(phase, []).extend(seconds)
        return merged

    def memory(self) -> tuple[int, int | None]:
        """Return the most memory taken, and the proportional share now."""
        return peak_bytes(), pss_bytes()


@contextmanager
def within_memory(where: str) -> Iterator[None]:
    """Say that memory ran out, whichever library's words it has; all else passes.

    Raises:
        EngineRunError: Memory ran out.
    """
    try:
        yield
    except Exception as error:
        said = error.problem if isinstance(error, MtlExportError) else str(error).strip()
        is_known = any(words in said.lower() for words in OUT_OF_MEMORY)
        if not is_known and not isinstance(error, MemoryError):
            raise
        raise EngineRunError(
            f"{where}: memory ran out ({(said or type(error).__name__).splitlines()[0]})",
            expected="memory for the batch and all that is computed from it",
            fix="Measure fewer models or smaller shapes at once",
        ) from error


def peak_bytes() -> int:
    """Return the most resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux it begins with what the parent had.
        return 1024 * _number(status, "VmHWM:")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pss_bytes() -> int | None:
    """Return this process's proportional share of memory, None where the system does not say."""
    rollup = Path("/proc/self/smaps_rollup")
    return 1024 * _number(rollup, "Pss:") if rollup.is_file() else None


def _number(path: Path, key: str) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
