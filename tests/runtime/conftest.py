"""One export of the toy model, as the command line writes it, serves the tests of runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.graph.lower import adapter_input_graph, merged_graph, routed_graph
from mtl_export.graph.parts import trace_parts
from mtl_export.graph.trace import TracedModel, trace
from mtl_export.graph.writer import write_graph, write_graphs
from mtl_export.runtime.onnx_adapters import adapter_file, write_adapter
from tests.factories import toy_base, toy_checkpoint
from tests.graph.language import language_bound


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project with ``base``, ``adapter`` and ``out/onnx`` in both layouts; not changed."""
    folder = tmp_path_factory.mktemp("project")
    toy_checkpoint(folder / "adapter", toy_base(folder / "base"))
    checkpoint = open_checkpoint(folder / "adapter")
    base = open_base(str(folder / "base"))
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    traced = trace(bound)
    target = folder / "out" / "onnx"
    target.mkdir(parents=True)
    write_graph(routed_graph(traced, bound), bound, target, None)
    for task in bound.adapters.tasks:
        (target / task.name).mkdir()
        write_graph(merged_graph(traced, bound, task), bound, target / task.name, task)
    return folder


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project of a tiny LLaMA: ``base``, ``adapter``, ``onnx``, two folders inside."""
    folder = tmp_path_factory.mktemp("language")
    bound = language_bound(folder, "LlamaForCausalLM")
    parts, target = trace_parts(bound), folder / "onnx"
    target.mkdir()
    write_graphs({part.stem: routed_graph(part, bound) for part in parts}, bound, target, None)
    task = bound.adapters.tasks[1]
    (target / task.name).mkdir()
    models = {part.stem: merged_graph(part, bound, task) for part in parts}
    write_graphs(models, bound, target / task.name, task)
    write_with_adapters(bound, parts, target / "adapter-input")
    return folder


def write_with_adapters(bound: BoundModel, parts: Sequence[TracedModel], folder: Path) -> None:
    """Write the graphs that take adapters, and every task's adapters."""
    folder.mkdir()
    lowered = {part.stem: adapter_input_graph(part, bound) for part in parts}
    write_graphs({stem: model for stem, (model, _) in lowered.items()}, bound, folder, None)
    for stem, (_, parameters) in lowered.items():
        for task in bound.adapters.tasks:
            values = {one.name: one.value(task.index).astype(np.float32) for one in parameters}
            write_adapter(folder / adapter_file(stem, task.name), values)
