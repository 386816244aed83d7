"""Known faults, planted into the tensors of exported toy graphs by the paper's own formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from typing_extensions import Self

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import MIXED, Case, RowLimits, build_cases, seeded_rows
from mtl_export.parity.diagnosis.layer_errors import Localisation
from mtl_export.parity.diagnosis.localise import localise
from mtl_export.parity.report import Cell, ParityReport
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.base import Runner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.adapters import toys
from tests.factories import VOCABULARY

# Given to whoever plants: the file's tensors by name. What it changes in place is written.
Tensors = dict[str, Array]
QUERY, WIDE, VALUE, NARROW, POOLER = toys.MODULES
MERGED_TASK = 1


class KeptOracle(OracleRunner):
    """An oracle that is loaded once for all tests and stays open."""

    def __exit__(self, *_: object) -> None:
        """Keep the model."""

    def __enter__(self) -> Self:
        """Load the model the first time."""
        return self if self.models else super().__enter__()


@dataclass(frozen=True)
class Exported:
    """A toy checkpoint, its graphs as they were written, and the oracle.

    Attributes:
        bound: The checkpoint and its base.
        single: Folder of the single graph.
        merged: Folder of the merged graph of ``MERGED_TASK``.
        cases: What artefacts are compared on.
        oracles: By dtype.
    """

    bound: BoundModel
    single: Path
    merged: Path
    cases: list[Case]
    oracles: Mapping[str, Runner]

    def artefact(self, folder: Path, *, is_merged: bool, dtype: str = "fp32") -> Artefact:
        """Return the graph in ``folder`` as an artefact."""
        path = folder / "model.onnx"
        return Artefact(
            name="per-task onnx" if is_merged else "single-graph onnx",
            kind="per-task" if is_merged else "single-graph",
            runner=OrtRunner(path, threads=1),
            task=self.bound.adapters.tasks[MERGED_TASK] if is_merged else None,
            dtype=dtype,
            checkpoint_sha256=self.bound.adapters.checkpoint_sha256,
            base_sha256=self.bound.base.sha256,
            path=path,
        )

    def localised(self, artefact: Artefact, case: str = MIXED) -> Localisation:
        """Return what is found where all tasks of an artefact failed in ``case``."""
        tasks = [artefact.task] if artefact.task else self.bound.adapters.tasks
        cells = tuple(
            Cell(artefact.name, "onnxruntime", task.name, case, "failed", "error") for task in tasks
        )
        report = ParityReport(cells, "", {}, {}, {})
        (found,) = localise(
            self.bound, [artefact], self.cases, report, oracle=self.oracles.__getitem__, threads=1
        )
        return found

    def planted(
        self, folder: Path, change: Callable[[Tensors], None], *, is_merged: bool
    ) -> Localisation:
        """Return what is found in a copy of a graph whose tensors ``change`` spoilt."""
        source = self.merged if is_merged else self.single
        return self.localised(
            self.artefact(spoilt(source, folder / "planted", change), is_merged=is_merged)
        )


def exported(folder: Path) -> Exported:
    """Export the toy checkpoint below ``folder``."""
    bound = toys.toy_bound(folder)
    traced = trace(bound)
    task = bound.adapters.tasks[MERGED_TASK]
    single, merged = folder / "single", folder / "merged"
    single.mkdir()
    merged.mkdir()
    write_graph(routed_graph(traced, bound), bound, single, None)
    write_graph(merged_graph(traced, bound, task), bound, merged, task)
    names = ("input_ids", "attention_mask", "token_type_ids")
    rows = seeded_rows(RowLimits(3, VOCABULARY, token_types=2), names)
    cases = build_cases(rows, RowLimits(3, VOCABULARY, 40, token_types=2))
    oracles = {dtype: KeptOracle(bound, dtype) for dtype in ("fp64", "fp32", "fp16")}
    return Exported(bound, single, merged, cases, oracles)


def spoilt(source: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Return a copy of a graph whose tensors ``change`` has changed; exactly what it changed."""
    shutil.copytree(source, folder)
    model = ir.load(source / "model.onnx")
    values = model.graph.initializers
    before = {name: value.const_value for name, value in values.items()}
    tensors = {
        name: np.array(tensor.numpy()) for name, tensor in before.items() if tensor is not None
    }
    kept = {name: array.copy() for name, array in tensors.items()}
    change(tensors)
    changed = [n for n, a in tensors.items() if not np.array_equal(a, kept[n], equal_nan=True)]
    assert changed, "nothing was planted"
    for name in changed:
        array = np.array(tensors[name], dtype=kept[name].dtype, order="C")
        assert array.shape == kept[name].shape
        values[name].const_value = ir.tensor(array, name=name)
    (folder / "model.onnx").unlink()
    ir.save(model, folder / "model.onnx")
    return folder


@dataclass(frozen=True)
class Recipe:
    """MTL-LoRA's formula with one term wrong.

    Attributes:
        temperature: tau.
        scale: In place of alpha / r; None for the right one.
        has_scaler: The learnt scale is applied.
        mean: The up-projections are averaged.
        change_lambda: What happens to Lambda_t.
        order: Of the up-projections.
        shift: Whose tensors task t takes: those of task t + shift.
        times: What the whole delta is multiplied with.
    """

    temperature: float = toys.TEMPERATURE
    scale: float | None = None
    has_scaler: bool = True
    mean: bool = False
    change_lambda: Callable[[Array], Array] = lambda full: full
    order: tuple[int, ...] = (0, 1)
    shift: int = 0
    times: float = 1.0

    def core(self, bound: BoundModel, module: str, task_index: int) -> Array:
        """Return core_t ``[n r, r]``."""
        tensors = bound.checkpoint.layers[module].tensors
        values = {role: tensor.numpy().astype(np.float64) for role, tensor in tensors.items()}
        task = (task_index + self.shift) % len(values["lambda"])
        weights = np.exp(values["mixing"][task] / self.temperature)
        weights = np.full_like(weights, 1 / len(weights)) if self.mean else weights / weights.sum()
        rank = len(values["down"])
        scale = toys.ALPHA / rank if self.scale is None else self.scale
        if self.has_scaler:
            scale /= 1 + float(np.exp(-values["scaler"]))
        full = self.change_lambda(values["lambda"][task])
        return np.concatenate([self.times * scale * weight * full for weight in weights])

    def up(self, bound: BoundModel, module: str) -> Array:
        """Return [B_1 ... B_n] in this order, ``[O, n r]``."""
        ups = bound.checkpoint.layers[module].tensors["up"].numpy()
        return np.concatenate([ups[index] for index in self.order], axis=1).astype(np.float64)


def plant(
    bound: BoundModel, module: str, recipe: Recipe, *, is_merged: bool
) -> Callable[[Tensors], None]:
    """Return what puts a layer computed by ``recipe`` into a graph."""

    def change(tensors: Tensors) -> None:
        up = recipe.up(bound, module)
        if not is_merged:
            for task in bound.adapters.tasks:
                core = recipe.core(bound, module, task.index)
                tensors[f"{module}.core"][task.index] = core.T
            tensors[f"{module}.up"][:] = up.T
            return
        down = bound.checkpoint.layers[module].tensors["down"].numpy().astype(np.float64)
        delta = up @ recipe.core(bound, module, MERGED_TASK) @ down
        base = bound.base_tensor(f"{module}.weight").numpy().astype(np.float64)
        tensors[f"{module}.weight_t"][:] = (base + delta).T

    return change


WITH_SCALER = toys.ALPHA / toys.RANK
# fault -> formula, what the cause says
RECIPES: dict[str, tuple[Recipe, str]] = {
    "lambda transposed": (Recipe(change_lambda=np.transpose), "Lambda is transposed"),
    "lambda diagonal": (
        Recipe(change_lambda=lambda full: np.diag(np.diag(full))),
        "only Lambda's diagonal",
    ),
    "lambda missing": (Recipe(change_lambda=lambda full: np.eye(len(full))), "Lambda is missing"),
    "temperature doubled": (
        Recipe(temperature=2 * toys.TEMPERATURE),
        "the temperature is doubled",
    ),
    "temperature halved": (Recipe(temperature=toys.TEMPERATURE / 2), "the temperature is halved"),
    "temperature missing": (Recipe(temperature=1.0), "the temperature is missing"),
    "mean": (Recipe(mean=True), "the mean of the up-projections instead of their softmax"),
    "no scale": (Recipe(scale=1.0), "alpha / r is missing"),
    "no alpha": (Recipe(scale=1 / toys.RANK), "alpha is missing"),
    "no rank": (Recipe(scale=toys.ALPHA), "1 / r is missing"),
    "scale twice": (Recipe(scale=WITH_SCALER**2), "alpha / r is applied twice"),
    "rank-stabilised": (Recipe(scale=toys.ALPHA / toys.RANK**0.5), "alpha / sqrt(r)"),
    "no learnt scale": (Recipe(has_scaler=False), "the learnt scale is missing"),
    "order": (Recipe(order=(1, 0)), "the up-projections are in another order (2, 1)"),
    "not merged": (Recipe(times=0.0), "the adapter is not merged"),
    "merged twice": (Recipe(times=2.0), "the adapter is merged twice"),
    "subtracted": (Recipe(times=-1.0), "the adapter is subtracted"),
    "another task": (Recipe(shift=1), "the adapter of task "),
}


# Five at a time, one for each adapted layer: each is judged on what it is given.
GROUPS = tuple(
    dict(zip(toys.MODULES, list(RECIPES)[start : start + len(toys.MODULES)], strict=False))
    for start in range(0, len(RECIPES), len(toys.MODULES))
)


def faulty(found: Localisation) -> list[tuple[str, str, str]]:
    """Return layer, task and cause of every layer that is wrong itself."""
    return [(e.layer, e.task, e.cause) for e in found.layers if e.verdict == "faulty"]
