"""Four dense tasks of one image: one graph beside four, beside PyTorch, beside a plain Swin.

    python tests/benchmarks/bench_dense.py [--threads 2] [--rounds 9]      (make bench-dense)

A Swin-T for images of 448 pixels with random weights, shared rank 64, task rank 4, heads as
published (hrnet, 18/36/72/144 channels), written as the trainer writes it and exported by us. In
turns, in one process: the graph of all tasks, the four graphs of one task each, and the unmerged
model in PyTorch. Peak memory is that of fresh processes, beside a graph of the same Swin-T without
tasks and heads. Prints medians, their quotients, and each output's error in noise floors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

import mtl_export as mx
from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.dense.export import freeze_biases
from mtl_export.dense.model import open_dense
from mtl_export.runtime.ort import open_session
from tests.dense.checkpoints import Recipe, checkpoint_file

SWIN_T = Recipe(
    image_size=448,
    window=7,
    depths=(2, 2, 6, 2),
    heads=(3, 6, 12, 24),
    embed=96,
    widths=(18, 36, 72, 144),
    channels={"semseg": 21, "normals": 3, "sal": 1, "human_parts": 7},
    shared_ranks=(64, 64, 64, 64),
    rank=4,
)


class _Trunk(torch.nn.Module):
    """A plain Swin: shared streams alone."""

    def __init__(self, model: MTLoRASwin) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the last stage's tokens."""
        shared: torch.Tensor = self.backbone(image)[-1].shared
        return shared


def plain_graph(folder: Path) -> Path:
    """Export a Swin-T of the same size without tasks and heads."""
    recipe = Recipe(**{**vars(SWIN_T), "mode": "lora_only"})
    model = open_dense(open_checkpoint(checkpoint_file(folder, recipe)))
    inner = MTLoRASwin.from_tensors(*model.folded(["sal"]))
    freeze_biases(inner)
    program = torch.onnx.export(
        _Trunk(inner), (torch.zeros(2, 3, 448, 448),), dynamo=True, input_names=["image"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}}, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(folder / "model.onnx", external_data=True)
    return folder / "model.onnx"


# argv: graph, threads. Without torch, which would be most of it.
RUN = """
import sys
from pathlib import Path
import numpy as np
from mtl_export.bench.measure import peak_bytes
from mtl_export.runtime.ort import open_session
session = open_session(Path(sys.argv[1]), threads=int(sys.argv[2]))
for _ in range(5):
    session.run(None, {"image": np.zeros((1, 3, 448, 448), np.float32)})
print(peak_bytes())
"""


def peak_mb(path: Path, threads: int) -> float:
    """Return the most resident memory of a fresh process that runs a graph, in MB."""
    command = [sys.executable, "-c", RUN, str(path), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) / 1e6


def main() -> None:
    """Build, export, measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), options.threads, options.rounds)


def measure(folder: Path, threads: int, rounds: int) -> None:
    """Export into ``folder`` and print the figures."""
    file, out = checkpoint_file(folder / "trained", SWIN_T), folder / "out"
    begun = perf_counter()
    mx.export_onnx(file, output=out / "onnx")
    exported = perf_counter() - begun
    mx.export_onnx(file, output=out / "onnx", layout="per-task")
    tasks = SWIN_T.tasks
    image = np.random.default_rng(0).standard_normal((1, 3, 448, 448)).astype(np.float32)
    one = open_session(out / "onnx" / "model.onnx", threads=threads)
    four = [open_session(out / "onnx" / task / "model.onnx", threads=threads) for task in tasks]
    trained = open_dense(open_checkpoint(file)).trained()

    def eager() -> None:
        with torch.inference_mode():
            trained(torch.from_numpy(image))

    turns: dict[str, Callable[[], object]] = {
        "one graph, 4 tasks": lambda: one.run(None, {"image": image}),
        "4 one-task graphs": lambda: [each.run(None, {"image": image}) for each in four],
        "PyTorch unmerged": eager,
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            begun = perf_counter()
            turn()
            times[name].append(perf_counter() - begun)
    found = {name: median(own[1:]) for name, own in times.items()}
    first = found["one graph, 4 tasks"]
    print(f"Swin-T 448, r 64/4, batch 1, {threads} threads, {rounds} rounds")
    for name, seconds in found.items():
        print(f"  {name:22}{seconds * 1e3:8.0f} ms   one graph / it {first / seconds:.2f}")
    own = peak_mb(out / "onnx" / "model.onnx", threads)
    plain = peak_mb(plain_graph(folder / "plain"), threads)
    print(f"  peak memory {own:.0f} MB, plain Swin-T {plain:.0f} MB: {own / plain:.2f}")
    print(f"  export of the graph of all tasks {exported:.0f} s")
    report = mx.parity(file, onnx=out / "onnx", quick=True, localise=False, threads=threads).report
    for cell in report.cells:
        if cell.artefact == "single-graph onnx" and cell.noise_floor and cell.max_abs_error:
            floors = cell.max_abs_error / cell.noise_floor
            print(f"  {cell.task:12}{cell.verdict}, error {floors:.1f} noise floors")


if __name__ == "__main__":
    main()
