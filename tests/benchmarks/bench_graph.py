"""What serving every task from one graph costs, beside one merged graph per task.

    python -m tests.benchmarks.bench_graph --cache DIR       (make bench-graph)

Builds once, in DIR: MTL-LoRA checkpoints of 8, 32 and 1000 tasks (r 8, n 3, 36 layers, random)
on MiniLM, and one of 8 tasks (r 8, n 3, all projections) on a LLaMA of SmolLM2-135M's shape
with random weights; and their graphs. Then prints quotients by a merged graph of one task:

    latency    single graph, and PyTorch unmerged on the same mixed batch, at 8x128, 32x64, 1x32;
               and PyTorch merged, which has no adapters to compute: what is left of the
               quotient of PyTorch by the single graph is the base model's own GEMMs
    tasks      latency with 1000 tasks by that with 8, and what the file grows by
    memory     most memory of a fresh process that serves 32 tasks
    decode     tokens a second, 1 and 8 rows, after prompts of 16

One session is open at a time: a block opens it, warms it up, runs it --runs times and closes
it. Blocks alternate and change places every round; a quotient is that of two neighbours'
medians, and the median of these over the rounds is what counts. On a busy machine look at the
last column of each row too: the quotient of the fastest runs of all rounds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.graph_inputs import (
    ENCODER_LAYERS,
    HIDDEN,
    LABELS,
    LAYERS,
    RANK,
    SMOLLM,
    TASKS,
    UPS,
    Inputs,
    encoder_rows,
)

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array

SHAPES = ((8, 128), (32, 64), (1, 32))
TARGETS = {(8, 128): 1.03, (32, 64): 1.03, (1, 32): 1.05}
PROMPT = 16
DEFAULT_CACHE = Path.home() / ".cache" / "mtl-export" / "bench-graph"
# argv: graph, threads. Prints the most memory the process ever had, in bytes.
PEAK = """
import sys
from mtl_export.runtime.ort import OrtRunner
from tests.benchmarks.graph_inputs import encoder_rows
from pathlib import Path
with OrtRunner(Path(sys.argv[1]), threads=int(sys.argv[2])) as runner:
    for _ in range(5):
        rows = encoder_rows(8, 128, tasks=32)
        runner.infer({name: rows[name] for name in runner.inputs})
peak = next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""
# So many runs -> the seconds of each
Block = Callable[[int], list[float]]
Found = dict[str, list[list[float]]]


def graph_block(path: Path, rows: Mapping[str, Array], threads: int) -> Block:
    """Return a block of a graph's runs."""
    from mtl_export.runtime.ort import OrtRunner

    def block(runs: int) -> list[float]:
        with OrtRunner(path, threads=threads) as runner:
            inputs = {name: rows[name] for name in runner.inputs}
            return _times_s(lambda: runner.infer(inputs), runs)

    return block


def eager_block(bound: BoundModel, rows: Mapping[str, Array], threads: int) -> Block:
    """Return a block of runs of PyTorch, unmerged."""
    from mtl_export.runtime.runners.pytorch import OracleRunner, use_threads

    use_threads(threads)

    def block(runs: int) -> list[float]:
        with OracleRunner(bound, "fp32") as runner:
            return _times_s(lambda: runner.infer(rows), runs)

    return block


def merged_block(folder: Path, rows: Mapping[str, Array], threads: int) -> Block:
    """Return a block of runs of PyTorch on one merged task."""
    from mtl_export.runtime.runners.pytorch import MergedRunner, use_threads

    use_threads(threads)

    def block(runs: int) -> list[float]:
        with MergedRunner(folder) as runner:
            inputs = {name: values for name, values in rows.items() if name != "task_ids"}
            return _times_s(lambda: runner.infer(inputs), runs)

    return block


def decode_block(folder: Path, batch: int, threads: int) -> Block:
    """Return a block of decoded tokens, one of each row a run."""
    from mtl_export.runtime.generation import Decoding
    from mtl_export.runtime.ort import OrtPart, open_session

    ids = np.random.default_rng(0).integers(3, SMOLLM["vocab_size"], (batch, PROMPT))
    task_ids = np.arange(batch) % TASKS if folder.name == "single" else None

    def block(runs: int) -> list[float]:
        paths = [folder / f"{stem}.onnx" for stem in ("prefill", "decode")]
        parts = [OrtPart(open_session(path, threads=threads), path) for path in paths]
        decoding = Decoding(parts[0], parts[1], ids, np.ones_like(ids), task_ids)
        return _times_s(lambda: decoding.feed(decoding.logits.argmax(axis=1)), runs)

    return block


def _times_s(run: Callable[[], object], runs: int) -> list[float]:
    for _ in range(3):
        run()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def in_blocks(blocks: Mapping[str, Block], rounds: int, runs: int) -> Found:
    """Return each block's times for every round; every other round goes backwards."""
    found: Found = {name: [] for name in blocks}
    for number in range(rounds):
        order = list(blocks)
        for name in order if number % 2 == 0 else order[::-1]:
            found[name].append(blocks[name](runs))
    return found


def quotients(found: Found, name: str, by: str) -> list[float]:
    """Return the quotients of neighbours' medians."""
    return [median(a) / median(b) for a, b in zip(found[name], found[by], strict=True)]


def fastest(found: Found, name: str) -> float:
    """Return the seconds of the fastest run."""
    return min(map(min, found[name]))


def print_latency(inputs: Inputs, arguments: argparse.Namespace) -> None:
    """Print single graph and PyTorch beside merged."""
    folder, bound = inputs.encoder(TASKS), inputs.encoder_bound(TASKS)
    print(f"\nMiniLM, T = {TASKS}, 36 layers, r {RANK}, n {UPS}, {arguments.threads} threads")
    for shape in SHAPES:
        rows = encoder_rows(*shape, tasks=TASKS)
        blocks = {
            name: graph_block(folder / name / "model.onnx", rows, arguments.threads)
            for name in ("merged", "single")
        }
        with _loads() as load:
            found = in_blocks(blocks, arguments.rounds, arguments.runs)
            del blocks["merged"]
            blocks["eager"] = eager_block(bound, rows, arguments.threads)
            blocks["eager merged"] = merged_block(inputs.merged(TASKS), rows, arguments.threads)
            eager = in_blocks(blocks, max(1, arguments.rounds // 2), max(5, arguments.runs // 4))
        print(
            f"{shape!s:10} merged {fastest(found, 'merged') * 1e3:8.2f} ms   {load()}\n"
            f"    single / merged         {_both(found, 'single', 'merged'):26}"
            f" target {TARGETS[shape]:.2f}\n"
            f"    eager / single          {_both(eager, 'eager', 'single'):26} target 3\n"
            f"    eager merged / single   {_both(eager, 'eager merged', 'single'):26}"
        )


def print_tasks(inputs: Inputs, arguments: argparse.Namespace, many: int = 1000) -> None:
    """Print latency and size with many tasks."""
    few, lots = inputs.encoder(TASKS), inputs.encoder(many)
    print(f"\nT = {many} by T = {TASKS}")
    for shape in SHAPES[::2]:
        blocks = {
            name: graph_block(
                folder / "single" / "model.onnx",
                encoder_rows(*shape, tasks=tasks),
                arguments.threads,
            )
            for name, folder, tasks in (("few", few, TASKS), ("many", lots, many))
        }
        with _loads() as load:
            found = in_blocks(blocks, arguments.rounds, arguments.runs)
        print(f"{shape!s:10}{_both(found, 'many', 'few'):>30}   {load()}")
    sizes = [sum(f.stat().st_size for f in (g / "single").glob("*.onnx*")) for g in (few, lots)]
    cores = (many - TASKS) * RANK * RANK * UPS * len(ENCODER_LAYERS) * LAYERS * 4
    heads = (many - TASKS) * (HIDDEN + 1) * LABELS * 4
    print(
        f"files: {sizes[0] / 1e6:.1f} MB -> {sizes[1] / 1e6:.1f} MB; T U D numbers a layer are"
        f" {cores / 1e6:.1f} MB, heads {heads / 1e6:.1f} MB, the rest"
        f" {(sizes[1] - sizes[0] - cores - heads) / 1e6:.2f} MB"
    )


def print_memory(inputs: Inputs, arguments: argparse.Namespace) -> None:
    """Print the most memory of fresh processes."""
    folder = inputs.encoder(32)
    peaks = {
        name: median(_peak_bytes(folder / name / "model.onnx", arguments.threads) for _ in range(3))
        for name in ("merged", "single")
    }
    print(
        f"\npeak memory, 32 tasks, 8x128: merged {peaks['merged'] / 1e6:.0f} MB, single"
        f" {peaks['single'] / 1e6:.0f} MB, {peaks['single'] / peaks['merged']:.3f} (target 1.05)"
    )


def print_decode(inputs: Inputs, arguments: argparse.Namespace) -> None:
    """Print tokens a second of the language model."""
    folder = inputs.language()
    print(f"\nSmolLM2-135M's shape, T = {TASKS}, all projections, decode after {PROMPT} tokens")
    for batch in (1, 8):
        blocks = {
            name: decode_block(folder / name, batch, arguments.threads)
            for name in ("merged", "single")
        }
        with _loads() as load:
            found = in_blocks(blocks, arguments.rounds, arguments.runs)
        print(
            f"{batch} rows: merged {batch / fastest(found, 'merged'):.1f} tokens/s, merged / single"
            f" {_both(found, 'merged', 'single')} (target 0.95)   {load()}"
        )


def _peak_bytes(graph: Path, threads: int) -> int:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PEAK, str(graph), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


@contextmanager
def _loads() -> Iterator[Callable[[], str]]:
    """Give the load before and after, in words: others' work is in every number."""
    before = os.getloadavg()[0]
    yield lambda: f"load {before:.1f} -> {os.getloadavg()[0]:.1f}"


def _both(found: Found, name: str, by: str) -> str:
    """Return a quotient: its median over rounds, how far it went, and that of fastest runs."""
    ratios = quotients(found, name, by)
    last = fastest(found, name) / fastest(found, by)
    return f"{median(ratios):.3f} ({min(ratios):.2f}..{max(ratios):.2f}) {last:.3f}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure graphs; see the module's docstring.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default="latency,tasks,memory,decode")
    arguments = parser.parse_args()
    inputs = Inputs(arguments.cache.resolve())
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds of {arguments.runs} runs")
    for part in (print_latency, print_tasks, print_memory, print_decode):
        if part.__name__.removeprefix("print_") in arguments.only.split(","):
            part(inputs, arguments)


if __name__ == "__main__":
    main()
