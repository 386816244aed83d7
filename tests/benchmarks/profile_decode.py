"""What decoding one token costs in ONNX Runtime, the low-rank path written in several ways.

    python -m tests.benchmarks.profile_decode [--cache DIR] [--threads 2] [--rounds 5]

SmolLM2-135M's shape, all projections adapted, r 8, n 3, 8 tasks: ``bench_graph``'s graphs, and
the decoding step once more for each way below, made from the merged one's nodes and the single
graph's weights. A step reads every weight once and starts some 70 nodes a layer, so what counts
is bytes and nodes, not products. Four values in a layer feed projections: to q, k and v, to o,
to gate and up, to down. k of them read the same x; D columns of z each, U of u.

Ways that compute what the single graph does, which is checked:

    a GEMM a layer      u = (x [A_1 ... A_k]) C, split;  y_i = [x, u_i] [W_i; up_i];
                        C the row's cores on the diagonal of [k D, k U]
    a GEMM an input     the same u;  y = [x, u] [[W_1 ... W_k]; ups on a diagonal], split

Ways that compute less, and show how little is left to gain:

    one up for all      a GEMM an input, the k ups read as one [U, sum of O]: no zeros to read
    no task at all      z = x [A_1 ... A_k];  y = [x, z] [[W_1 ... W_k]; k D rows], split

Whatever routes rows to tasks must read A, meet the task, and get into y: three nodes for each x
at least. The last way has two of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.benchmarks.bench_graph import DEFAULT_CACHE, PROMPT, Block, fastest, in_blocks, quotients
from tests.benchmarks.graph_inputs import SMOLLM, TASKS, Inputs

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

A_LAYER, AN_INPUT = "a GEMM a layer", "a GEMM an input"
ONE_UP, NO_TASK = "one up for all", "no task at all"
RIGHT = (A_LAYER, AN_INPUT)
WEIGHT = ".weight_t"


@dataclass
class Site:
    """The projections of one x.

    Attributes:
        x: The value that they read.
        modules: Their names.
        results: The values that they make.
        weights: W ``[I, O]`` of each.
        downs: ``[I, D]`` of each.
        cores: ``[T + 1, D, U]`` of each.
        ups: ``[U, O]`` of each.
    """

    x: str
    modules: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    downs: list[Array] = field(default_factory=list)
    cores: list[Array] = field(default_factory=list)
    ups: list[Array] = field(default_factory=list)

    def core(self, way: str) -> Array:
        """Return the stack that u needs, ``[T + 1, k D, U or k U]``."""
        if way == ONE_UP:
            return np.concatenate(self.cores, 1)
        return np.stack([_diagonal(blocks) for blocks in zip(*self.cores, strict=True)])


def _diagonal(blocks: Sequence[Array]) -> Array:
    """Return the matrices on the diagonal of one."""
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (0, 1))
    whole, row, column = np.zeros((rows, columns), np.float32), 0, 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


class Rewriting:
    """One way, on its way into a merged graph.

    Args:
        way: Which.
    """

    def __init__(self, way: str) -> None:
        self.way = way
        self.initializers: list[onnx.TensorProto] = []
        self._stacks: dict[tuple[int, ...], list[tuple[str, Array]]] = {}

    def nodes(self, site: Site) -> list[onnx.NodeProto]:
        """Return what takes the place of a site's MatMuls."""
        module, many = site.modules[0], len(site.modules)
        down = self._weight(f"{module}.downs", np.concatenate(site.downs, 1))
        made = [helper.make_node("MatMul", [site.x, down], [f"{module}/z"])]
        low = f"{module}/z"
        if self.way != NO_TASK:
            core = site.core(self.way)
            self._stacks.setdefault(core.shape, []).append((f"{module}/core", core))
            low = f"{module}/u"
            made.append(helper.make_node("MatMul", [f"{module}/z", f"{module}/core"], [low]))
        if self.way == A_LAYER and many > 1:
            parts = [f"{name}/u_own" for name in site.modules]
            made.append(self._split(low, parts, [core.shape[2] for core in site.cores]))
        elif self.way == A_LAYER:
            parts = [low]
        else:
            return [*made, *self._joint(site, low)]
        for name, part, y, weight, up in zip(
            site.modules, parts, site.results, site.weights, site.ups, strict=True
        ):
            rows = self._weight(f"{name}.rows", np.concatenate([weight, up]))
            made.append(helper.make_node("Concat", [site.x, part], [f"{name}/join"], axis=-1))
            made.append(helper.make_node("MatMul", [f"{name}/join", rows], [y]))
        return made

    def gathers(self) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that pick each row's cores, one Gather for each shape of them."""
        self.initializers.append(numpy_helper.from_array(np.array([0]), "stack_axis"))
        for number, cores in enumerate(self._stacks.values()):
            stack = self._weight(f"cores{number}", np.stack([core for _, core in cores]))
            parts = [f"{name}/kept" for name, _ in cores]
            yield helper.make_node("Gather", [stack, "task_ids"], [f"{stack}/own"], axis=1)
            yield self._split(f"{stack}/own", parts, [1] * len(parts), axis=0)
            for (name, _), part in zip(cores, parts, strict=True):
                yield helper.make_node("Squeeze", [part, "stack_axis"], [name])

    def _joint(self, site: Site, low: str) -> Iterator[onnx.NodeProto]:
        """Yield one GEMM for all projections, and the Split of what it makes."""
        module, wide = site.modules[0], np.concatenate(site.weights, 1)
        rows = _diagonal(site.ups) if self.way == AN_INPUT else np.concatenate(site.ups, 1)
        if self.way == NO_TASK:
            rows = np.resize(rows, (sum(down.shape[1] for down in site.downs), wide.shape[1]))
        stacked = self._weight(f"{module}.rows", np.concatenate([wide, rows]))
        y = site.results[0] if len(site.results) == 1 else f"{module}/y"
        yield helper.make_node("Concat", [site.x, low], [f"{module}/join"], axis=-1)
        yield helper.make_node("MatMul", [f"{module}/join", stacked], [y])
        if len(site.results) > 1:
            yield self._split(y, site.results, [weight.shape[1] for weight in site.weights])

    def _weight(self, name: str, values: Array) -> str:
        array = np.ascontiguousarray(values, np.float32)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def _split(
        self, value: str, parts: Sequence[str], sizes: Sequence[int], axis: int = -1
    ) -> onnx.NodeProto:
        self.initializers.append(numpy_helper.from_array(np.array(sizes), f"{value}.sizes"))
        return helper.make_node("Split", [value, f"{value}.sizes"], list(parts), axis=axis)


def sites(merged: onnx.ModelProto, single: onnx.ModelProto) -> list[Site]:
    """Return what the merged graph's adapted MatMuls read, with the single graph's weights."""
    weights = {one.name: one for one in single.graph.initializer}
    found: dict[str, Site] = {}
    for node in merged.graph.node:
        module = node.input[1].removesuffix(WEIGHT) if node.op_type == "MatMul" else ""
        if f"{module}.core" in weights:
            site = found.setdefault(node.input[0], Site(node.input[0]))
            site.modules.append(module)
            site.results.append(node.output[0])
            for kept, part in (
                (site.weights, WEIGHT), (site.downs, ".down"), (site.cores, ".core"),
                (site.ups, ".up"),
            ):  # fmt: skip
                kept.append(numpy_helper.to_array(weights[module + part]))
    return list(found.values())


def write_way(merged: onnx.ModelProto, found: Sequence[Site], way: str, folder: Path) -> Path:
    """Write the merged graph with every site done in one way; return the file."""
    model, rewriting = onnx.ModelProto(), Rewriting(way)
    model.CopyFrom(merged)
    # A site's nodes stand where the first of its MatMuls stood: x is there, and no result yet read.
    first = {site.results[0]: rewriting.nodes(site) for site in found}
    gone = {y for site in found for y in site.results}
    nodes = list(rewriting.gathers())
    for node in merged.graph.node:
        nodes += first.get(node.output[0], []) if node.output[0] in gone else [node]
    read = {name for node in nodes for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in read]
    for part, values in (("node", nodes), ("initializer", [*kept, *rewriting.initializers])):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(values)
    if way != NO_TASK:
        ids = helper.make_tensor_value_info("task_ids", TensorProto.INT64, ["batch"])
        model.graph.input.append(ids)
    path = folder / f"{way.replace(' ', '-')}.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def step(path: Path, batch: int, threads: int) -> Callable[[], Array]:
    """Return what runs one step of a graph, and gives its logits ``[B, 1, L]``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random, heads = np.random.default_rng(0), SMOLLM["num_key_value_heads"]
    cached = (batch, heads, PROMPT, SMOLLM["hidden_size"] // SMOLLM["num_attention_heads"])
    rows = {
        "input_ids": random.integers(3, SMOLLM["vocab_size"], (batch, 1)),
        "attention_mask": np.ones((batch, PROMPT + 1), np.int64),
        "task_ids": np.arange(batch) * 5 % TASKS,
    }
    feed = {
        given.name: rows[given.name]
        if given.name in rows
        else random.normal(0, 1, cached).astype(np.float32)
        for given in session.get_inputs()
    }
    place = [output.name for output in session.get_outputs()].index("logits")
    return lambda: session.run(None, feed)[place]


def block_of(path: Path, batch: int, threads: int) -> Block:
    """Return a block of steps."""

    def block(runs: int) -> list[float]:
        run, times = step(path, batch, threads), []
        for number in range(runs + 3):
            began = time.perf_counter()
            run()
            if number >= 3:
                times.append(time.perf_counter() - began)
        return times

    return block


def main() -> None:
    """Print tokens a second of every way, by those of the merged graph."""
    parser = argparse.ArgumentParser(description="Profile decoding; see the docstring.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=30)
    asked = parser.parse_args()
    folder = Inputs(asked.cache.resolve()).language()
    paths = {name: folder / name / "decode.onnx" for name in ("merged", "single")}
    merged, single = (onnx.load(path) for path in paths.values())
    found = sites(merged, single)
    print(f"{len(merged.graph.node)} nodes merged, {len(found)} values feed adapted projections")
    with tempfile.TemporaryDirectory(dir=asked.cache) as scratch:
        for way in (*RIGHT, ONE_UP, NO_TASK):
            paths[way] = write_way(merged, found, way, Path(scratch))
            count = len(onnx.load(paths[way], load_external_data=False).graph.node)
            print(f"{way:20}{count - len(merged.graph.node):6} nodes more")
        wanted = step(paths["single"], TASKS, asked.threads)()
        for way in RIGHT:
            y = step(paths[way], TASKS, asked.threads)()
            np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-3, err_msg=way)
        for batch in (1, TASKS):
            blocks = {name: block_of(path, batch, asked.threads) for name, path in paths.items()}
            times = in_blocks(blocks, asked.rounds, asked.runs)
            print(f"\n{batch} rows, {asked.threads} threads, load {os.getloadavg()[0]:.1f}")
            for name in blocks:
                by = quotients(times, "merged", name)
                last = fastest(times, "merged") / fastest(times, name)
                milliseconds = fastest(times, name) * 1e3
                print(
                    f"{name:20}{milliseconds:8.2f} ms{median(by):8.3f} of merged's tokens a second"
                    f" ({min(by):.2f}..{max(by):.2f}), fastest by fastest {last:.3f}"
                )


if __name__ == "__main__":
    main()
