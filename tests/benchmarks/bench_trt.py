"""How long engines of eight tasks take beside one, and how much memory one takes.

    python tests/benchmarks/bench_trt.py [--rounds 3]

MiniLM (22 M parameters) with an MTL-LoRA checkpoint of eight tasks, exported once as eight
merged graphs and as the single graph; and a stack of matrices of 600 MB, because a small
model's memory is mostly the compiler's. In turns, each in a fresh process, as ``mtl-export
trt`` builds them:

    one        the engine of one task
    eight      those of all
    single     the engine of the single graph
    memory     the engine of 600 MB of weights

Prints seconds of building (without starting Python, with reading the graph), how much of
that is parsing, peak memory, and the quotients that are promised:

    eight / (8 x (one - its parse))    at most 1.2
    single / one                       at most 2
    peak memory / weights              at most 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in (".", "cli", "calibration")]
TASKS = 8
PATH = os.pathsep.join(str(ROOT / part) for part in (".", "cli", "calibration"))
EXPORT = "from mtl_export_cli.main import main; main()"
# argv: folder to write to, ONNX files
BUILD = "from tests.benchmarks.bench_trt import build; build()"
WIDTH, LAYERS = 2048, 36


@dataclass(frozen=True)
class Took:
    """What one process took.

    Attributes:
        seconds: Building, parsing included.
        parse_seconds: Until the builder began, of the first engine.
        peak_bytes: Most memory at a time.
    """

    seconds: float
    parse_seconds: float
    peak_bytes: int


class Parse:
    """Notes when the first engine is begun, and when its parse is over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, order: object) -> None:
        """Note the beginning."""
        self.reached(0.0)

    def reached(self, share: float) -> None:
        """Note the builder's first report."""
        from time import perf_counter

        if len(self.times) < 2:
            self.times.append(perf_counter())


def build() -> None:
    """Build the engines of the graphs in ``sys.argv``; print what it took as JSON."""
    from mtl_export.tensorrt import (
        BuildOptions,
        EngineOrder,
        EnginePart,
        available_builder,
        default_profile,
        run_job,
    )

    folder, *names = map(Path, sys.argv[1:])

    @contextmanager
    def place(order: EngineOrder) -> Iterator[Path]:
        order.target.mkdir(parents=True)
        yield order.target

    orders = []
    for number, path in enumerate(names):
        options = BuildOptions(profiles=(default_profile(path),))
        part = EnginePart(path, "model.engine", options)
        orders.append(EngineOrder(str(number), folder / str(number), (part,), 1))
    parse = Parse()
    name = available_builder().name
    outcomes = run_job(orders, place, library_name=name, begin=parse.begin, reached=parse.reached)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(json.dumps([seconds, parse.times[1] - parse.times[0]]))


def measured(paths: Sequence[Path]) -> Took:
    """Return what building the engines of ``paths`` takes in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="bench-trt-") as folder:
        command = [sys.executable, "-c", BUILD, folder, *map(str, paths)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PATH}
        )
        assert process.stdout is not None
        with process.stdout as said:
            seconds, parse_seconds = json.loads(said.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Took(seconds, parse_seconds, usage.ru_maxrss << 10)


def exported(folder: Path) -> Path:
    """Return the folder of MiniLM's graphs, the single one and eight merged ones."""
    from tests.benchmarks.bench_onnx import BASE, write_checkpoint

    checkpoint = write_checkpoint(folder / "adapter")
    for layout in ("single-graph", "per-task"):
        words = ["onnx", "-c", checkpoint, "-b", BASE, "-o", folder / "onnx", "--all-tasks", "-qq",
                 "--layout", layout]  # fmt: skip
        subprocess.run(
            [sys.executable, "-c", EXPORT, *map(str, words)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": PATH},
        )
    return folder / "onnx"


def stack_of_matrices(folder: Path) -> Path:
    """Write a graph of ``LAYERS`` products of ``WIDTH`` x ``WIDTH`` and return its path."""
    import onnx
    from onnx import TensorProto, helper

    generator = np.random.default_rng(0)
    folder.mkdir()
    tensors, nodes, name = [], [], "x"
    with (folder / "model.onnx.data").open("wb") as data:
        for layer in range(LAYERS):
            weight = generator.standard_normal((WIDTH, WIDTH), np.float32) / WIDTH**0.5
            tensor = TensorProto(
                name=f"weight{layer}", data_type=TensorProto.FLOAT, dims=weight.shape,
                data_location=TensorProto.EXTERNAL,
            )  # fmt: skip
            where = {"location": "model.onnx.data", "offset": data.tell(), "length": weight.nbytes}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(weight.tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [name, tensor.name], [f"product{layer}"]))
            nodes.append(helper.make_node("Relu", [f"product{layer}"], [f"x{layer}"]))
            name = f"x{layer}"
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", WIDTH])
        for end in ("x", name)
    ]
    graph = helper.make_graph(nodes, "matrices", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure engine builds; see the docstring.")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="bench-trt-") as name:
        folder = Path(name)
        graphs = exported(folder)
        tasks = [graphs / f"task{index}" / "model.onnx" for index in range(TASKS)]
        cases = {
            "one": tasks[:1],
            "eight": tasks,
            "single": [graphs / "model.onnx"],
            "memory": [stack_of_matrices(folder / "matrices")],
        }
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {rounds} rounds")
        runs: dict[str, list[Took]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case, paths in cases.items():
                runs[case].append(measured(paths))
    print(f"{'':8}{'build s (min..max)':>22}{'parse s':>9}{'peak MB':>9}")
    took = {}
    for case, found in runs.items():
        seconds = [one.seconds for one in found]
        took[case] = Took(
            median(seconds),
            median(one.parse_seconds for one in found),
            max(one.peak_bytes for one in found),
        )
        print(
            f"{case:8}{took[case].seconds:8.2f} ({min(seconds):.2f}..{max(seconds):.2f})".ljust(30)
            + f"{took[case].parse_seconds:9.2f}{took[case].peak_bytes / 1e6:9.0f}"
        )
    one = took["one"]
    weights_bytes = LAYERS * WIDTH * WIDTH * 4
    quotients = (
        ("eight / (8 x (one - its parse))", took["eight"].seconds
         / (TASKS * (one.seconds - one.parse_seconds)), 1.2),
        ("single / one", took["single"].seconds / one.seconds, 2.0),
        ("peak memory / weights", took["memory"].peak_bytes / weights_bytes, 3.0),
    )  # fmt: skip
    for name, quotient, promised in quotients:
        print(f"{name:34}{quotient:6.2f}   promised: at most {promised}")


if __name__ == "__main__":
    main()
