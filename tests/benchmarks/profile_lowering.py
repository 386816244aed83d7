"""What one adapted linear costs in ONNX Runtime, written in every way that stock nodes allow.

    python -m tests.benchmarks.profile_lowering [--threads 2] [--rounds 7]

MiniLM's three shapes of linear, r 8, n 3 (24 columns of up), 8 tasks. Each way is a graph of
its own; all give the same numbers, which is checked. They run in blocks, by turns, and what is
printed is the quotient of fastest runs by the bare ``MatMul(x, W)`` that a merged model has.
Above it stands the arithmetic: how many more multiplications the low-rank path is, with the
up-projection shared by all tasks (r I + r U + U O) or composed for each row (r I + r O). A way
that cost nothing but these, each as fast as one in the wide product, would reach that number.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.benchmarks.graph_inputs import HIDDEN, MIDDLE, RANK, TASKS, UPS

if TYPE_CHECKING:
    import onnxruntime

    from mtl_export.checkpoint.tensors import Array

COLUMNS = RANK * UPS
# Inputs, outputs, how many of a layer.
LINEARS = ((HIDDEN, HIDDEN, 4), (HIDDEN, MIDDLE, 1), (MIDDLE, HIDDEN, 1))
BATCHES = ((8, 128), (32, 64), (1, 32))
BARE, RUNS = "merged: x W", 20
Nodes = list[onnx.NodeProto]


@dataclass(frozen=True)
class Linear:
    """One linear and its rows.

    Attributes:
        batch: Rows.
        sequence: Tokens of each.
        inputs: I.
        outputs: O.
    """

    batch: int
    sequence: int
    inputs: int
    outputs: int

    def initializers(self) -> dict[str, Array]:
        """Return every weight that some way needs, by name."""
        random = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            values: Array = random.normal(0, 0.02, shape).astype(np.float32)
            return values

        weight, down = normal(self.inputs, self.outputs), normal(self.inputs, RANK)
        up = normal(COLUMNS, self.outputs)
        return {
            "W": weight, "A": down, "up": up, "cores": normal(TASKS, RANK, COLUMNS) * 50,
            "W|A": np.concatenate([weight, down], 1), "W/up": np.concatenate([weight, up], 0),
            "widths": np.array([self.outputs, RANK]), "tokens, O": np.array([-1, self.outputs]),
            "tokens, I": np.array([-1, self.inputs]), "tokens, U": np.array([-1, COLUMNS]),
            "batch, sequence, O": np.array([self.batch, self.sequence, self.outputs]),
        }  # fmt: skip


def _node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node; names of several values stand between semicolons."""
    return helper.make_node(operator, inputs.split("; "), outputs.split("; "), **attributes)


def ways() -> dict[str, Nodes]:
    """Return the nodes of each way, from x ``[B, S, I]`` and task_ids ``[B]`` to y."""
    gather = _node("Gather", "cores; task_ids", "core", axis=0)
    base, down = _node("MatMul", "x; W", "base"), _node("MatMul", "x; A", "z")
    wide = [_node("MatMul", "x; W|A", "both"), _node("Split", "both; widths", "base; z", axis=-1)]
    mixed, delta = _node("MatMul", "z; core", "u"), _node("MatMul", "u; up", "delta")
    compose, composed = _node("MatMul", "core; up", "own"), _node("MatMul", "z; own", "delta")
    add = _node("Add", "base; delta", "y")
    onto = [
        _node("Reshape", "u; tokens, U", "u2"),
        _node("Reshape", "base; tokens, O", "base2"),
        _node("Gemm", "u2; up; base2", "y2"),
        _node("Reshape", "y2; batch, sequence, O", "y"),
    ]
    under = [
        _node("Reshape", "delta; tokens, O", "delta2"),
        _node("Reshape", "x; tokens, I", "x2"),
        _node("Gemm", "x2; W; delta2", "y2"),
        _node("Reshape", "y2; batch, sequence, O", "y"),
    ]
    joined = [_node("Concat", "x; u", "xu", axis=-1), _node("MatMul", "xu; W/up", "y")]
    return {
        BARE: [_node("MatMul", "x; W", "y")],
        "x W + u up": [gather, base, down, mixed, delta, add],
        "[x, u] [W; up]": [gather, down, mixed, *joined],
        "x [W, A], + u up": [gather, *wide, mixed, delta, add],
        "x [W, A], Gemm onto": [gather, *wide, mixed, *onto],
        "x W, Gemm onto": [gather, base, down, mixed, *onto],
        "Gemm of x W onto u up": [gather, down, mixed, delta, *under],
        "x W + z (core up)": [gather, compose, base, down, composed, add],
        "x [W, A], + z (core up)": [gather, compose, *wide, composed, add],
    }


def session(
    nodes: Nodes, weights: dict[str, Array], inputs: int, threads: int
) -> onnxruntime.InferenceSession:
    """Return the nodes, loaded."""
    import onnxruntime

    read = {name for node in nodes for name in node.input}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "linear",
        [
            value("x", TensorProto.FLOAT, ["batch", "sequence", inputs]),
            value("task_ids", TensorProto.INT64, ["batch"]),
        ],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in read],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def seconds(linear: Linear, threads: int, rounds: int) -> dict[str, float]:
    """Return each way's fastest run, in seconds; the ways run in blocks, by turns.

    Raises:
        AssertionError: A way does not compute what the plain one does.
    """
    random, weights = np.random.default_rng(1), linear.initializers()
    shape = (linear.batch, linear.sequence, linear.inputs)
    rows = {
        "x": random.normal(0, 1, shape).astype(np.float32),
        "task_ids": np.arange(linear.batch) * 5 % TASKS,
    }
    every = ways()

    def block(name: str) -> tuple[Array, float]:
        """Return the answer and the fastest run of one way, loaded for these runs alone.

        Threads of other sessions would wait by spinning, on the cores that are measured.
        """
        one = session(every[name], weights, linear.inputs, threads)
        feed = {given.name: rows[given.name] for given in one.get_inputs()}
        y, least = one.run(None, feed)[0], float("inf")
        for _ in range(RUNS):
            began = time.perf_counter()
            one.run(None, feed)
            least = min(least, time.perf_counter() - began)
        return y, least

    best = dict.fromkeys(every, float("inf"))
    wanted = None
    for number in range(rounds):
        for name in list(every) if number % 2 == 0 else list(every)[::-1]:
            y, least = block(name)
            best[name] = min(best[name], least)
            if name != BARE:
                wanted = y if wanted is None else wanted
                np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    return best


def arithmetic(inputs: int, outputs: int) -> tuple[float, float]:
    """Return the multiplications by those of ``x W``: up shared, and up composed for each row."""
    base = inputs * outputs
    shared = RANK * inputs + RANK * COLUMNS + COLUMNS * outputs
    return 1 + shared / base, 1 + (RANK * inputs + RANK * outputs) / base


def main() -> None:
    """Print one table for each batch, and the sum over a layer."""
    parser = argparse.ArgumentParser(description="Profile lowerings; see the docstring.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    heads = [f"{inputs} -> {outputs}" for inputs, outputs, _ in LINEARS]
    for batch, sequence in BATCHES:
        found = [
            seconds(Linear(batch, sequence, inputs, outputs), asked.threads, asked.rounds)
            for inputs, outputs, _ in LINEARS
        ]
        counts = [count for _, _, count in LINEARS]
        print(f"\n{batch} x {sequence}, {asked.threads} threads, load {os.getloadavg()[0]:.1f}")
        print(f"{'':26}" + "".join(f"{head:>14}" for head in [*heads, "4 + 1 + 1"]))
        products = [inputs * outputs * count for inputs, outputs, count in LINEARS]
        for kind, label in enumerate(("arithmetic, up shared", "arithmetic, up composed")):
            parts = [arithmetic(inputs, outputs)[kind] for inputs, outputs, _ in LINEARS]
            whole = sum(a * b for a, b in zip(parts, products, strict=True)) / sum(products)
            print(f"{label:26}" + "".join(f"{value:14.3f}" for value in [*parts, whole]))
        bare = [times[BARE] for times in found]
        for name in found[0]:
            spent = [times[name] for times in found]
            whole = sum(np.multiply(spent, counts)) / sum(np.multiply(bare, counts))
            parts = [a / b for a, b in zip(spent, bare, strict=True)]
            print(f"{name:26}" + "".join(f"{value:14.3f}" for value in [*parts, whole]))
        least = sum(np.multiply([min(list(t.values())[1:]) for t in found], counts))
        print(f"{'cheapest way of each':26}{'':42}{least / sum(np.multiply(bare, counts)):14.3f}")


if __name__ == "__main__":
    main()
