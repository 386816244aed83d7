"""What each way to deploy a checkpoint costs, told from shapes before any work.

    strategy              on disk                    in memory, all tasks   to switch task
    merged, standalone    T base                     T base                 load base
    merged, shared        base + T touched           base + T touched       load touched
    single-graph          base + adapters            base + adapters        nothing: an input
    engine per task       T base                     T base                 load base
    single engine         base + adapters            base + adapters        nothing: an input

T are the tasks asked for; the single graph and its engine hold every task of the checkpoint,
and are costed so. Bytes are exact but for headers and tokenizer files. Memory while merging
is that of the buffers of ``stream``. Graphs are traced in float32 with the whole model in
memory. Times rest on speeds measured on this machine by ``measure_speeds``: the longer of
moving the bytes and of computing them on all cores. How long an engine builds cannot be told
from shapes, and is left out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.merge.chunks import CHUNK_BYTES, TOGETHER
from mtl_export.merge.fold import BLOCK, Delta
from mtl_export.merge.layout import Layout, output_dtype
from mtl_export.merge.one_pass import WRITERS, core_count
from mtl_export.merge.rounding import Scratch
from mtl_export.merge.writer import MergeOptions, layout_of
from mtl_export.names import SINGLE_ENGINE, SINGLE_GRAPH

# Measured: what python with numpy holds, and what torch, transformers and a trace add.
PYTHON_BYTES = 45_000_000
WORKER_BYTES = 12_000_000
TRACER_BYTES = 400_000_000
# Measured: from typing the command to the first byte.
START_S = 0.3
PROBE_BYTES = 64 << 20
MERGED, SHARED = "merged, standalone", "merged, shared"
ENGINES = "engine per task"


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine does.

    Attributes:
        read_bytes_per_s: From the base's disk, or from memory if the base is there.
        write_bytes_per_s: To the output's disk, until it is there.
        fold_per_s: Elements folded and rounded on one core.
        hash_bytes_per_s: SHA-256 on one core.
        cores: How many.
        free_bytes: Free on the output's disk.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    fold_per_s: float
    hash_bytes_per_s: float
    cores: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Strategy:
    """The cost of one way to deploy.

    Attributes:
        name: See the module's table.
        command: What to type.
        read_bytes: To make it.
        write_bytes: To make it.
        peak_bytes: Memory while it is made.
        seconds: To make it; None where it cannot be told.
        disk_bytes: What is left.
        serving_bytes: Weights in memory when all tasks are served at once.
        switch_bytes: To be loaded when one process goes from one task to another.
        fits: Whether the output's disk has room.
    """

    name: str
    command: str
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    seconds: float | None
    disk_bytes: int
    serving_bytes: int
    switch_bytes: int
    fits: bool

    def switch_s(self, speeds: Speeds) -> float:
        """Return how long a switch of tasks takes, at the speed the base is read."""
        return self.switch_bytes / speeds.read_bytes_per_s


@dataclass(frozen=True)
class Plan:
    """All strategies, and which to take.

    Attributes:
        tasks: How many.
        adapted: How many layers.
        touched_bytes: What one task changes, as written.
        strategies: In the order of the module's table.
        recommended: The name of one of them.
        reason: Why, one sentence without a full stop.
        speeds: What the times rest on.
        refused: Why no graph can be exported; empty if one can.
    """

    tasks: int
    adapted: int
    touched_bytes: int
    strategies: tuple[Strategy, ...]
    recommended: str
    reason: str
    speeds: Speeds
    refused: str = ""


def make_plan(
    bound: BoundModel,
    tasks: Sequence[Task],
    dtype: str | None,
    speeds: Speeds,
    refused: str = "",
) -> Plan:
    """Return what each strategy costs for ``tasks``.

    Args:
        bound: The adapter and its base; no weight is read.
        tasks: The tasks to deploy.
        dtype: As for merging; graphs and engines compute in it, too, and in fp32 if it is None.
            The commands name it.
        speeds: What the machine does.
        refused: Why no graph can be exported; empty if one can. Then neither graphs nor engines
            are strategies.
    """
    alone = layout_of(bound, tasks, MergeOptions(dtype=dtype))
    shared = layout_of(bound, tasks, MergeOptions(dtype=dtype, layout="shared"))
    one = sum(file.size_bytes for file in alone.own[tasks[0].name])
    touched = sum(file.size_bytes for file in shared.own[tasks[0].name])
    base_bytes = sum(file.stat().st_size for file in bound.base.weight_files)
    width = {"fp16": 2, "bf16": 2}.get(dtype or "", 4)
    engine = _elements(bound) * width
    single = engine + _adapter_bytes(bound, width)
    peak = _peak_bytes(bound, tasks)
    tracing = TRACER_BYTES + 2 * _elements(bound) * 4

    def strategy(
        name: str, command: str, disk: int, switch: int, seconds: float | None, memory: int
    ) -> Strategy:
        typed = f"mtl-export {command}" + (f" --dtype {dtype}" if dtype else "")
        return Strategy(name, typed, base_bytes, disk, memory, seconds, disk,
                        disk, switch, disk <= speeds.free_bytes)  # fmt: skip

    def merging(layout: Layout) -> float:
        return _merge_s(bound, layout, base_bytes, speeds)

    tracing_s = (base_bytes / speeds.read_bytes_per_s) + (single / speeds.write_bytes_per_s)
    count, total = len(tasks), len(bound.adapters.tasks)
    which = "--all-tasks"
    if count < total:
        which = " ".join(f"--task {task.name}" for task in tasks)
    strategies: tuple[Strategy, ...] = (
        strategy(MERGED, f"merge {which}", alone.size_bytes, one, merging(alone), peak),
        strategy(SHARED, f"merge {which} --layout shared", shared.size_bytes, touched,
                 merging(shared), peak),
        strategy(SINGLE_GRAPH, "onnx --all-tasks", single, 0, tracing_s + 10.0, tracing),
        strategy(ENGINES, f"trt {which} --layout per-task", engine * count, engine, None,
                 tracing + engine),
        strategy(SINGLE_ENGINE, "trt --all-tasks", single, 0, None, tracing + engine),
    )  # fmt: skip
    if refused:
        strategies = strategies[:2]
    name, reason = _recommendation(strategies, count, total)
    layers = len(bound.adapters.layers)
    return Plan(count, layers, touched, strategies, name, reason, speeds, refused)


def measure_speeds(bound: BoundModel, folder: Path) -> Speeds:
    """Return this machine's speeds, from a second's work in and on the disks in question.

    Args:
        bound: Its base is read, a little of it.
        folder: The output folder, or one that will be made; its disk is written, a little.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    size = min(PROBE_BYTES, max(1 << 20, free // 4))
    data = np.random.default_rng(0).bytes(size)
    with tempfile.TemporaryFile(dir=existing) as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - begun)
    begun = time.perf_counter()
    hashlib.sha256(data).digest()
    hashed = size / (time.perf_counter() - begun)
    return Speeds(
        read_bytes_per_s=_read_speed(bound.base.weight_files[0]),
        write_bytes_per_s=write,
        fold_per_s=_fold_speed(),
        hash_bytes_per_s=hashed,
        cores=core_count(),
        free_bytes=free,
    )


def _read_speed(file: Path) -> float:
    done = 0
    begun = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        buffer = bytearray(4 << 20)
        while done < PROBE_BYTES and (count := opened.readinto(buffer)):
            done += count
    return max(done, 1) / (time.perf_counter() - begun)


def _fold_speed() -> float:
    """Return how many elements a second one core folds into bfloat16, at rank 16."""
    width, rank, rounds = 2048, 16, 30
    rows = BLOCK // width
    generator = np.random.default_rng(0)
    delta = Delta(
        generator.standard_normal((rows, rank)), generator.standard_normal((rank, width)), None
    )
    scratch = Scratch(BLOCK)
    base = generator.standard_normal(BLOCK).astype(np.float32)
    out = np.empty(BLOCK, np.uint16)
    begun = time.perf_counter()
    for _ in range(rounds):
        exact = delta.fold(scratch.widen(base), slice(0, rows), scratch)
        scratch.round_to(exact, "BF16", out)
    return rounds * BLOCK / (time.perf_counter() - begun)


def _merge_s(bound: BoundModel, layout: Layout, base_bytes: int, speeds: Speeds) -> float:
    pieces = [piece for files in layout.own.values() for file in files for piece in file.pieces]
    folded = sum(prod(piece.shape) for piece in pieces if piece.task is not None)
    moving = base_bytes / speeds.read_bytes_per_s + layout.size_bytes / speeds.write_bytes_per_s
    hashed = layout.size_bytes + (0 if bound.base.is_hashed else base_bytes)
    computing = folded / speeds.fold_per_s + hashed / speeds.hash_bytes_per_s
    return START_S + max(moving, computing / speeds.cores)


def _peak_bytes(bound: BoundModel, tasks: Sequence[Task]) -> int:
    """Return the memory of a merge: buffers of every thread, and the layers being folded."""
    slots = (core_count() + WRITERS) * CHUNK_BYTES * (2 + min(len(tasks), TOGETHER))
    largest = max((_factor_bytes(bound, module) for module in bound.adapters.layers), default=0)
    workers = core_count() * (WORKER_BYTES + BLOCK * 23 + 4 * largest)
    return PYTHON_BYTES + slots + workers


def _factor_bytes(bound: BoundModel, module: str) -> int:
    layer = bound.adapters.outlines[module]
    blocks = [layer.factors(index) for index in range(layer.task_count)]
    if isinstance(layer, LayerAdapter):
        blocks = blocks[:1]
    return sum(block.down.nbytes + block.up.nbytes for block in blocks if block is not None)


def _adapter_bytes(bound: BoundModel, width: int) -> int:
    """Return what the single graph adds to the base: factors, cores of all tasks and of none."""
    total = 0
    for module in bound.adapters.layers:
        layer = bound.adapters.outlines[module]
        total += _factor_bytes(bound, module) // 4 * width
        cores = [layer.factors(index) for index in range(layer.task_count)]
        total += sum(block.core.size for block in cores if block is not None) * width
    heads = [head for heads in bound.adapters.heads.values() for head in heads]
    return total + sum(head.weight.size + head.bias.size for head in heads) * width


def _elements(bound: BoundModel) -> int:
    """Return the base's floating-point elements; graphs hold all of them in one dtype."""
    return sum(
        prod(tensor.shape)
        for tensor in bound.base.tensors.values()
        if output_dtype(tensor, "fp32") == "F32"
    )


def _recommendation(strategies: Sequence[Strategy], count: int, total: int) -> tuple[str, str]:
    by_name = {strategy.name: strategy for strategy in strategies}
    if count == 1:
        return MERGED, "one task needs no routing: a plain model that everything loads"
    saved = 1 - by_name[SHARED].disk_bytes / by_name[MERGED].disk_bytes
    can_export = SINGLE_GRAPH in by_name
    if can_export and by_name[SINGLE_GRAPH].fits:
        return SINGLE_GRAPH, (
            f"one copy of the base serves all {total} tasks, also mixed in one batch, and"
            f" switching costs nothing; where a runtime wants plain models, --layout shared"
            f" takes {saved:.0%} less disk than standalone ones"
        )
    if by_name[SHARED].fits:
        return SHARED, f"it takes {saved:.0%} less disk than standalone models"
    return SINGLE_GRAPH if can_export else SHARED, "nothing fits on the disk; this needs the least"
