"""One trace of the toy model serves every test of the graphs, as it serves every task."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.bundle.manifest import Recipe
from mtl_export.bundle.output import output_folder
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph, write_graphs
from mtl_export.runtime.golden import GOLDEN_FILE, golden_bytes
from tests.adapters import toys
from tests.factories import toy_base
from tests.graph.mixed_heads import write_mixed
from tests.graph.task_edits import bound_of, four_tasks, golden


@pytest.fixture(scope="session")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the toy checkpoint bound to the toy base."""
    return toys.toy_bound(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="session")
def traced(bound: BoundModel) -> TracedModel:
    """Return the one trace."""
    return trace(bound)


@pytest.fixture(scope="session")
def routed_folder(
    bound: BoundModel, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of the single graph."""
    folder = tmp_path_factory.mktemp("routed")
    write_graph(routed_graph(traced, bound), bound, folder, None)
    return folder


@pytest.fixture(scope="session")
def merged_folders(
    bound: BoundModel, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Return one folder per task, in id order."""
    folders = []
    for task in bound.adapters.tasks:
        folder = tmp_path_factory.mktemp(task.name)
        write_graph(merged_graph(traced, bound, task), bound, folder, task)
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def four(bound: BoundModel, tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the checkpoint with the fourth task."""
    return bound_of(tmp_path_factory.mktemp("four") / "adapter", four_tasks(), bound.base.folder)


@pytest.fixture
def served(bound: BoundModel, traced: TracedModel, tmp_path: Path) -> Path:
    """Return a fresh folder of the single graph, as two parts, with golden vectors."""
    sources = {
        "base_sha256": bound.base.sha256,
        "checkpoint_sha256": bound.adapters.checkpoint_sha256,
    }
    recipe = Recipe("onnx", {"layout": "single-graph"}, sources, "1")
    with output_folder(tmp_path / "onnx", recipe=recipe) as plan:
        models = {stem: routed_graph(traced, bound) for stem in ("model", "other")}
        write_graphs(models, bound, plan.folder, None)
        vectors = [golden(plan.folder, task.name, [task.index] * 2) for task in toys.TASKS]
        vectors += [golden(plan.folder, "mixed", [2, 0, 1, 2]),
                    golden(plan.folder, "unknown", [2, 3])]  # fmt: skip
        (plan.folder / GOLDEN_FILE).write_bytes(golden_bytes(vectors))
    return tmp_path / "onnx"


@pytest.fixture(scope="session", params=["shared factors", "factors of their own"])
def mixed_bound(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> BoundModel:
    """Return tasks whose heads differ in what they compute, bound."""
    folder = write_mixed(
        tmp_path_factory.mktemp("hub"), is_shared=request.param == "shared factors"
    )
    checkpoint = open_checkpoint(folder)
    base = open_base(str(toy_base(tmp_path_factory.mktemp("base"))))
    return bind(checkpoint, read_adapters(checkpoint, base), base)


@pytest.fixture(scope="session")
def mixed_trace(mixed_bound: BoundModel) -> TracedModel:
    """Return its trace."""
    return trace(mixed_bound)


@pytest.fixture(scope="session")
def mixed_folder(
    mixed_bound: BoundModel, mixed_trace: TracedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of the single graph."""
    folder = tmp_path_factory.mktemp("single")
    write_graph(routed_graph(mixed_trace, mixed_bound), mixed_bound, folder, None)
    return folder
