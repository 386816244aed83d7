"""Every kind of model that runs as one graph: merged, single graph and one task a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.one_task import OneTaskRunner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.graph import kinds
from tests.graph.kinds import KINDS, Kind

# Neither batch nor length was traced; every task occurs in the first.
SHAPES = [(5, 9), (2, 33), (1, kinds.POSITIONS)]
TASK_IDS = np.array([2, 0, 1, 0, 2])
ATOL = 1e-5
# Inputs with mixed tasks, the oracle's outputs, and what float32 costs it.
Case = tuple[dict[str, Array], dict[str, Array], dict[str, float]]


class Toy:
    """One kind's model, trace and graphs, each made when first asked for."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        self.bound: BoundModel = kinds.toy_bound(kind, folder / "base")
        self.traced: TracedModel = trace(self.bound)

    def written(self, name: str, model: ir.Model) -> Path:
        """Return the file of a graph."""
        folder = self._folder / name
        folder.mkdir()
        write_graph(model, self.bound, folder, None)
        return folder / "model.onnx"

    def oracle(self, dtype: str) -> OracleRunner:
        """Return the unmerged model."""
        return OracleRunner(self.bound, dtype)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Return each kind in turn."""
    return Toy(request.param, tmp_path_factory.mktemp("kind"))


@pytest.fixture(scope="module")
def single(toy: Toy) -> Path:
    """Return the single graph."""
    return toy.written("single", routed_graph(toy.traced, toy.bound))


@pytest.fixture(scope="module")
def cases(toy: Toy) -> list[Case]:
    """Return one case of each shape."""
    found = []
    with toy.oracle("fp64") as exact, toy.oracle("fp32") as lower:
        for batch, sequence in SHAPES:
            inputs = {**toy.kind.rows(batch, sequence), "task_ids": TASK_IDS[:batch]}
            wanted, rounded = exact.infer(inputs), lower.infer(inputs)
            floors = {name: largest_error(rounded[name], wanted[name]) for name in wanted}
            found.append((inputs, wanted, floors))
    return found


def largest_error(found: Array, wanted: Array) -> float:
    """Return the largest error where there are labels."""
    finite = np.isfinite(wanted)
    return float(np.abs(found[finite] - wanted[finite]).max())


def assert_same(
    found: Mapping[str, Array], wanted: Mapping[str, Array], floors: Mapping[str, float]
) -> None:
    """Compare every output, and where there are no labels."""
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        np.testing.assert_array_equal(np.isneginf(found[name]), np.isneginf(values))
        finite = np.isfinite(values)
        assert finite.any()
        atol = floors[name] + ATOL
        np.testing.assert_allclose(found[name][finite], values[finite], rtol=0, atol=atol)


def test_the_single_graph_is_the_unmerged_model(toy: Toy, single: Path, cases: list[Case]) -> None:
    """Mixed batches of sizes nobody traced, every task in them."""
    onnx.checker.check_model(str(single), full_check=True)
    with OrtRunner(single, threads=1) as runner:
        for inputs, wanted, floors in cases:
            assert_same(runner.infer(inputs), wanted, floors)


def test_merged_graphs_are_the_unmerged_model(toy: Toy, cases: list[Case]) -> None:
    """Each task's graph answers that task's rows, as wide as its own labels."""
    for task in toy.bound.adapters.tasks:
        path = toy.written(task.name, merged_graph(toy.traced, toy.bound, task))
        with OrtRunner(path, threads=1) as runner:
            for inputs, wanted, floors in cases:
                rows = inputs["task_ids"] == task.index
                if rows.any():
                    own = {n: value[rows] for n, value in inputs.items() if n != "task_ids"}
                    labels = slice(len(task.labels) or None)
                    expected = {n: value[rows][..., labels] for n, value in wanted.items()}
                    assert_same(runner.infer(own), expected, floors)


def test_one_task_for_the_batch(toy: Toy, cases: list[Case]) -> None:
    """task_ids [1] chooses for all rows; an id that no task has answers NaN for all."""
    model = routed_graph(toy.traced, toy.bound, task_input="scalar")
    assert model.graph.inputs[-1].shape == ir.Shape([1])
    assert model.metadata_props["mtl_export.task_input"] == "scalar"
    path = toy.written("scalar", model)
    onnx.checker.check_model(str(path), full_check=True)
    with OneTaskRunner(OrtRunner(path, threads=1)) as runner:
        for inputs, wanted, floors in cases:
            assert_same(runner.infer(inputs), wanted, floors)
        inputs = {**cases[0][0], "task_ids": np.full(len(TASK_IDS), 3)}
        for values in runner.infer(inputs).values():
            assert np.isnan(values).all()


@pytest.mark.parametrize("bad", [3, -1, 2**32])
def test_an_unknown_id_is_nan_in_its_rows_only(toy: Toy, single: Path, bad: int) -> None:
    """Whatever windows or tokens a row becomes, its neighbours do not notice."""
    rows = toy.kind.rows(3, 9)
    with OrtRunner(single, threads=1) as runner:
        good = runner.infer({**rows, "task_ids": np.array([1, 0, 2])})
        found = runner.infer({**rows, "task_ids": np.array([1, bad, 2])})
    for name, values in found.items():
        assert np.isnan(values[1]).all()
        np.testing.assert_array_equal(values[[0, 2]], good[name][[0, 2]])
