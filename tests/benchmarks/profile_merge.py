"""Where a merge's time goes: every stage by itself, on one core and on all at once.

    python tests/benchmarks/profile_merge.py [--cache DIR]

Runs the very functions that a merge calls on blocks of a LLaMA-shaped bfloat16 layer and prints
nanoseconds an element. ``alone`` is one process on an idle machine; ``all cores`` is one on
every core at the same time, which is how a merge runs. Cores that share arithmetic units or a
memory bus are slower so, and no order of work changes that. The last lines add the stages up
for a model of ``--elements`` folded elements (1.1 B LLaMA, all projections: 969 million): what
one merge must take with every core busy all the time, and writing and reading free.
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

from mtl_export.merge.lanes import PAGE, WriteLane
from mtl_export.merge.merge import BLOCK, Delta
from mtl_export.merge.rounding import Scratch

# Stored shapes of a LLaMA of 1.1 B parameters: q and o, k and v, gate and up, down.
SHAPES = {"2048 wide": 2048, "5632 wide": 5632}
RANK = 16
ROUNDS, REPEATS = 9, 40
ELEMENTS = 969_000_000
BYTES = 2
# Every stage begins so long after the one before, in all processes at once.
SLICE_S = 1.5


def stages(width: int, folder: Path) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what a merge does to one block, and how many elements that is."""
    generator = np.random.default_rng(0)
    rows = BLOCK // width
    count = rows * width
    values = generator.normal(0, 0.02, count).astype(ml_dtypes.bfloat16)
    left, right = generator.normal(0, 0.02, (rows, RANK)), generator.normal(0, 0.02, (RANK, width))
    scratch, out = Scratch(count), np.empty(count, ml_dtypes.bfloat16)
    base = scratch.widen(values)
    delta = Delta(left, right, None)
    product = np.empty((rows, width))
    exact = delta.fold(base, slice(0, rows), scratch)
    lane = WriteLane(folder / f"{os.getpid()}-{width}", b"", 1 << 30)
    memory = np.zeros((1 << 20) + PAGE, np.uint8)
    skipped = -memory.ctypes.data % PAGE
    page = memory[skipped : skipped + (1 << 20)]

    def write() -> None:
        # Hashing is a stage of its own, so the lane is asked to write only.
        lane._write_directly(page.data, 0)

    return {
        "widen bfloat16 to float64": (lambda: scratch.widen(values), count),
        "multiply the factors": (lambda: np.matmul(left, right, out=product), count),
        "multiply and add": (lambda: delta.fold(base, slice(0, rows), scratch), count),
        "round to bfloat16": (lambda: scratch.round_to(exact, "BF16", out), count),
        "hash what is written": (lambda: hashlib.sha256(page.data), page.size // BYTES),
        "write past the cache": (write, page.size // BYTES),
    }


def nanoseconds(job: tuple[int, str, float]) -> dict[str, float]:
    """Return each stage's nanoseconds an element; begins when the clock says so."""
    width, folder, begin = job
    found = {}
    every = stages(width, Path(folder))
    for number, (name, (run, count)) in enumerate(every.items()):
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


COMPUTED = ("widen bfloat16 to float64", "multiply and add", "round to bfloat16")
HASHED = "hash what is written"


def measured(width: int, processes: int, folder: str) -> dict[str, float]:
    """Return the slowest process's nanoseconds an element."""
    jobs = [(width, folder, time.time() + 2.0)] * processes
    with get_context("spawn").Pool(processes) as pool:
        results = pool.map(nanoseconds, jobs, chunksize=1)
    return {name: max(result[name] for result in results) for name in results[0]}


def main() -> None:
    """Print the table and the sum."""
    parser = argparse.ArgumentParser(description="Profile merging; see the module's docstring.")
    parser.add_argument("--cache", type=Path, help="Where files are written; the disk to measure.")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--tasks", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the processes, as the merge command does
    cores = os.cpu_count() or 1
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; nanoseconds an element, rank {RANK}")
    print(f"{'':32}{'alone':>8}{'all cores':>12}{'slower by':>12}")
    sums = []
    with TemporaryDirectory(dir=arguments.cache) as folder:
        for title, width in SHAPES.items():
            alone, together = measured(width, 1, folder), measured(width, cores, folder)
            print(title)
            for name, value in alone.items():
                ratio = together[name] / value
                print(f"  {name:30}{value:8.2f}{together[name]:12.2f}{ratio:12.2f}")
            sums.append((alone, together))
    for tasks in (1, arguments.tasks):
        parts = [sum_s(found, arguments.elements, tasks) / cores for _, found in sums]
        print(f"T={tasks}: computing and hashing alone take {min(parts):.1f} to {max(parts):.1f} s")


def sum_s(found: dict[str, float], elements: int, tasks: int) -> float:
    """Return the processor seconds of a merge: the base is widened once for all tasks."""
    widen, fold, rounding = (found[name] for name in COMPUTED)
    return elements * 1e-9 * (widen + tasks * (fold + rounding + found[HASHED]))


if __name__ == "__main__":
    main()
