"""Refit, stripped weights and timing caches on a real GPU, with full TensorRT.

Opt-in: ``pytest -m gpu tests/gpu``. Skipped, with the reason, where TensorRT builds nothing
here or the library that builds is TensorRT-RTX, which refuses all three.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.errors import BackendMissingError
from mtl_export.runtime.ort import OrtRunner
from mtl_export.tensorrt import (
    BuildOptions,
    TensorRTBackend,
    available_builder,
    build_engine,
    default_profile,
    manifest_path,
    restore_weights,
)
from mtl_export.tensorrt.differences import differing_weights
from mtl_export.tensorrt.refit import ROUND_TRIP, EngineBuilder
from tests.tensorrt.models import routed_inputs, write_merged

pytestmark = pytest.mark.gpu

# |engine - onnxruntime| / largest |value|, float32 without TF32
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _full_tensorrt() -> None:
    try:
        info = available_builder("tensorrt")
    except BackendMissingError as missing:
        pytest.skip(str(missing))
    if not info.can_run:
        pytest.skip(info.reason)


def check_numbers(graph: Path, engine: Path) -> None:
    """Compare an engine with its graph in ONNX Runtime, at a size between the profile's."""
    inputs = {"input_ids": routed_inputs(3, 7)["input_ids"]}
    with OrtRunner(graph) as reference, TensorRTBackend(engine) as candidate:
        expected = reference.infer(inputs)["logits"]
        found = candidate.infer(inputs)["logits"]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_every_refitted_engine_computes_its_own_graph(tmp_path: Path) -> None:
    """All weights differ between three tasks; the first is built, the others refitted."""
    graphs = [write_merged(tmp_path / str(seed), seed=seed) for seed in range(3)]
    options = BuildOptions(
        profiles=(default_profile(graphs[0], max_batch=4),),
        refit=True,
        refittable=differing_weights(graphs)[graphs[0]],
    )
    builds = EngineBuilder("tensorrt")
    for number, graph in enumerate(graphs):
        engine = graph.with_name("model.engine")
        manifest = builds.build(graph, engine, options)
        manifest.write(manifest_path(engine))
        assert (ROUND_TRIP in [check.check for check in manifest.validated]) == (number > 0)
    for graph in graphs:
        check_numbers(graph, graph.with_name("model.engine"))


def test_stripped_engine_is_whole_again(tmp_path: Path) -> None:
    """Small without its weights, refused by the runner, right with them."""
    graph, small, whole = write_merged(tmp_path), tmp_path / "small.engine", tmp_path / "w.engine"
    options = BuildOptions(profiles=(default_profile(graph, max_batch=4),), strip_weights=True)
    manifest = build_engine(graph, small, options, library_name="tensorrt")
    manifest.write(manifest_path(small))
    assert "its weights were left out" in TensorRTBackend(small).why_not_runnable()
    restore_weights(small, graph, whole).write(manifest_path(whole))
    check_numbers(graph, whole)


def test_timing_cache_is_written_and_taken_again(tmp_path: Path) -> None:
    """The second build reads what the first has timed."""
    graph, cache = write_merged(tmp_path), tmp_path / "kernels.bin"
    options = BuildOptions(profiles=(default_profile(graph, max_batch=4),), timing_cache=cache)
    for name in ("first.engine", "second.engine"):
        build_engine(graph, tmp_path / name, options, library_name="tensorrt")
        assert cache.stat().st_size > 0
