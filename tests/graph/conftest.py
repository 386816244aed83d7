"""One trace of the toy model serves every test of the graphs, as it serves every task."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph
from tests.adapters import toys


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
