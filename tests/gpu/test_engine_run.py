"""Engines on a real GPU: they open, are what their manifests say, and compute the graph.

Opt-in: ``pytest -m gpu tests/gpu``. Without a GPU that the installed TensorRT builds
for, every test is skipped with the reason.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.errors import BackendMissingError, EngineRunError, IntegrityError
from mtl_export.runtime.ort import OrtRunner
from mtl_export.tensorrt import (
    BuildOptions,
    TensorRTBackend,
    available_builder,
    build_engine,
    default_profile,
    manifest_path,
)
from tests.tensorrt.models import routed_inputs, write_routed

pytestmark = pytest.mark.gpu

# |engine - onnxruntime| / largest |value|: TF32 is off, so float32 rounding over sums of 24.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}


@pytest.fixture(scope="module", params=sorted(TOLERANCE))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a graph and its engine, or skip."""
    try:
        info = available_builder()
    except BackendMissingError as missing:
        pytest.skip(str(missing))
    if not info.can_run:
        pytest.skip(info.reason)
    folder = tmp_path_factory.mktemp(str(request.param))
    path = write_routed(folder, dtype=request.param)
    profiles = [default_profile(path, max_batch=1), default_profile(path, max_batch=8)]
    engine = folder / "model.engine"
    build_engine(path, engine, BuildOptions(profiles)).write(manifest_path(engine))
    return folder


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 7), (3, 7), (8, 64), (5, 512)])
def test_engine_equals_onnxruntime(built: Path, batch: int, sequence: int) -> None:
    """Mixed tasks, sizes at both ends and between, one engine opened per test."""
    inputs = routed_inputs(batch, sequence)
    with (
        OrtRunner(built / "model.onnx") as reference,
        TensorRTBackend(built / "model.engine") as candidate,
    ):
        expected = reference.infer(inputs)["logits"]
        found = candidate.infer(inputs)["logits"]
        again = candidate.infer(inputs)["logits"]
    precision = TensorRTBackend(built / "model.engine").manifest.precision[0]
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE[precision] * np.abs(expected).max()
    assert np.array_equal(found, again)


def test_bad_task_id_is_refused_by_the_host_and_poisoned_by_the_graph(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two guards: without the first, the row is NaN and the others are untouched."""
    inputs = routed_inputs(3, 7)
    with TensorRTBackend(built / "model.engine") as backend:
        good = backend.infer(inputs)["logits"]
        for bad in (-1, 3):
            inputs["task_ids"][1] = bad
            with pytest.raises(EngineRunError, match="outside the table"):
                backend.infer(inputs)
            with monkeypatch.context() as patch:
                patch.setattr(
                    "mtl_export.tensorrt.runner._refuse_unknown_tasks",
                    lambda ids, manifest: None,
                )
                poisoned = backend.infer(inputs)["logits"]
            assert np.isnan(poisoned[1]).all()
            assert np.array_equal(poisoned[[0, 2]], good[[0, 2]])


def test_engine_that_differs_from_its_manifest_is_refused(built: Path, tmp_path: Path) -> None:
    """The hash agrees, the declared output does not."""
    engine = tmp_path / "model.engine"
    engine.write_bytes((built / "model.engine").read_bytes())
    text = manifest_path(built / "model.engine").read_text().replace('"logits"', '"scores"')
    manifest_path(engine).write_text(text)
    with pytest.raises(IntegrityError, match="scores"), TensorRTBackend(engine):
        pytest.fail("the block was entered")
