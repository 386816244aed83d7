"""Where a merge's time goes: every stage by itself, and with eight tasks in turn.

    python tests/benchmarks/profile_merge.py [--cache DIR]

Runs the very functions that a merge calls on blocks of a LLaMA-shaped bfloat16 layer, on every
core at the same time as a merge does, and prints nanoseconds an element:

    again     one stage on one block, again and again: all it reads and writes is in the cache
    in turn   as in a merge of eight tasks: block after block, and each task's factors and
              output, and the bytes to be hashed, have left the nearest cache in between

The last lines add the stages up for a model of ``--elements`` folded elements (1.1 B LLaMA, all
projections: 969 million): what one merge must take with every core busy all the time, its start
and its end left out, and the disk writing beside the cores.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.merge.fold import BLOCK, Delta
from mtl_export.merge.hashed_files import PAGE, HashedOutput
from mtl_export.merge.rounding import Scratch

# Stored shapes of a LLaMA of 1.1 B parameters: q and o, k and v, gate and up, down.
SHAPES = {"2048 wide": 2048, "5632 wide": 5632}
RANK, TASKS = 16, 8
ROUNDS, REPEATS, BLOCKS = 9, 40, 8
ELEMENTS = 969_000_000
BYTES = 2
# Every stage begins so long after the one before, in all processes at once.
SLICE_S = 1.5
WIDEN, FOLD, ROUND = "widen bfloat16 to float64", "multiply and add", "round to bfloat16"
HASH, WRITE = "hash what is written", "write past the cache"
STAGES = (WIDEN, FOLD, ROUND, HASH, WRITE)


class Bench:
    """Blocks of one layer, and what tasks make of them.

    Args:
        width: Elements of a row.
        folder: Where files are written.
    """

    def __init__(self, width: int, folder: Path) -> None:
        generator = np.random.default_rng(0)
        self.rows = BLOCK // width
        self.count = self.rows * width
        shape = (BLOCKS, self.count)
        self.values = generator.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)
        self.deltas = [
            Delta(
                generator.normal(0, 0.02, (BLOCKS * self.rows, RANK)),
                generator.normal(0, 0.02, (RANK, width)),
                None,
            )
            for _ in range(TASKS)
        ]
        self.scratch = Scratch(self.count)
        memory = np.zeros(TASKS * BLOCKS * self.count * BYTES + PAGE, np.uint8)
        skipped = -memory.ctypes.data % PAGE
        used = memory[skipped : skipped + TASKS * BLOCKS * self.count * BYTES]
        self.outputs = used.view(ml_dtypes.bfloat16).reshape(TASKS, BLOCKS, self.count)
        self._lane = HashedOutput(folder / f"{os.getpid()}-{width}", b"", 1 << 30)

    def write(self, output: Array) -> None:
        """Write whole pages of a task's output; hashing is a stage of its own."""
        data = output.reshape(-1).view(np.uint8)
        self._lane._write_directly(data[: data.size // PAGE * PAGE].data, 0)

    def again(self) -> dict[str, float]:
        """Return each stage's nanoseconds an element, on one block."""
        scratch, output = self.scratch, self.outputs[0]
        base = scratch.widen(self.values[0])
        exact = self.deltas[0].fold(base, slice(0, self.rows), scratch)
        # Hashed and written are bytes of several blocks, as in a merge.
        stages: dict[str, tuple[Callable[[], object], int]] = {
            WIDEN: (lambda: scratch.widen(self.values[0]), self.count),
            FOLD: (lambda: self.deltas[0].fold(base, slice(0, self.rows), scratch), self.count),
            ROUND: (lambda: scratch.round_to(exact, "BF16", output[0]), self.count),
            HASH: (lambda: hashlib.sha256(output.reshape(-1).view(np.uint8)), output.size),
            WRITE: (lambda: self.write(output), output.size),
        }
        found, begin = {}, time.time()
        for number, (name, (run, count)) in enumerate(stages.items()):
            run()
            # All processes are in the same stage at the same time.
            time.sleep(max(0.0, begin + number * SLICE_S - time.time()))
            times = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                for _ in range(REPEATS):
                    run()
                times.append((time.perf_counter() - began) / REPEATS)
            found[name] = min(times) / count * 1e9
        return found

    def in_turn(self) -> dict[str, float]:
        """Return each stage's nanoseconds an element, every task's turn coming for each block."""
        spent: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            spent.append(dict.fromkeys(STAGES, 0.0))
            for block, values in enumerate(self.values):
                self._fold_all(block, values, spent[-1])
            began = time.perf_counter()
            hashed = hashlib.sha256()
            for output in self.outputs:
                hashed.update(output.reshape(-1).view(np.uint8))
            spent[-1][HASH] = time.perf_counter() - began
            began = time.perf_counter()
            for output in self.outputs:
                self.write(output)
            spent[-1][WRITE] = time.perf_counter() - began
        counts = dict.fromkeys(STAGES, self.outputs.size) | {WIDEN: self.values.size}
        return {name: min(s[name] for s in spent) / counts[name] * 1e9 for name in STAGES}

    def _fold_all(self, block: int, values: Array, spent: dict[str, float]) -> None:
        rows = slice(block * self.rows, (block + 1) * self.rows)
        began = time.perf_counter()
        base = self.scratch.widen(values)
        spent[WIDEN] += time.perf_counter() - began
        for delta, output in zip(self.deltas, self.outputs[:, block], strict=True):
            began = time.perf_counter()
            exact = delta.fold(base, rows, self.scratch)
            folded = time.perf_counter()
            self.scratch.round_to(exact, "BF16", output)
            spent[FOLD] += folded - began
            spent[ROUND] += time.perf_counter() - folded


def profile(job: tuple[int, str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what one process measures, beginning when the clock says so."""
    width, folder, begin = job
    bench = Bench(width, Path(folder))
    time.sleep(max(0.0, begin - time.time()))
    return bench.again(), bench.in_turn()


def measured(width: int, processes: int, folder: str) -> list[dict[str, float]]:
    """Return the slowest process's nanoseconds an element: again, and in turn."""
    jobs = [(width, folder, time.time() + 3.0)] * processes
    with get_context("spawn").Pool(processes) as pool:
        results = pool.map(profile, jobs, chunksize=1)
    return [
        {name: max(result[kind][name] for result in results) for name in STAGES} for kind in (0, 1)
    ]


def sum_s(found: dict[str, float], elements: int, tasks: int) -> float:
    """Return the processor seconds of a merge: the base is widened once for all tasks."""
    each = found[FOLD] + found[ROUND] + found[HASH]
    return elements * 1e-9 * (found[WIDEN] + tasks * each)


def main() -> None:
    """Print the table and the sums."""
    parser = argparse.ArgumentParser(description="Profile merging; see the module's docstring.")
    parser.add_argument("--cache", type=Path, help="Where files are written; the disk to measure.")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the processes, as the merge command does
    cores = os.cpu_count() or 1
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; nanoseconds an element, rank {RANK}")
    print(f"{'':32}{'again':>8}{'in turn':>10}")
    turns = []
    with TemporaryDirectory(dir=arguments.cache) as folder:
        for title, width in SHAPES.items():
            again, in_turn = measured(width, cores, folder)
            print(title)
            for name in STAGES:
                print(f"  {name:30}{again[name]:8.2f}{in_turn[name]:10.2f}")
            turns.append(in_turn)
    for tasks in (1, TASKS):
        sums = [sum_s(found, arguments.elements, tasks) / cores for found in turns]
        print(f"T={tasks}: widen, fold, round, hash take {min(sums):.1f} to {max(sums):.1f} s")


if __name__ == "__main__":
    main()
