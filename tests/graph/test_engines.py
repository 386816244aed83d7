"""Graphs as this project exports them, in every precision, become TensorRT-RTX engines.

Each holds local functions, cores and heads that are gathered by task, and heads of several
widths. ``tests/tensorrt/test_graphs.py`` builds small graphs of one kind each.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.passes.precision import PrecisionPass
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graph
from mtl_export.tensorrt import BuildOptions, EngineManifest, build_engine, default_profile
from mtl_export_calibration.formats import format_named
from mtl_export_calibration.layers import find_layers
from mtl_export_calibration.qdq import QuantisationPlan, quantise

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")


def engine_of(model: ir.Model, bound: BoundModel, folder: Path) -> EngineManifest:
    """Return the manifest of the engine of ``model``."""
    write_graph(model, bound, folder, None)
    path = folder / "model.onnx"
    written = onnx.load(path, load_external_data=False)
    assert {function.domain for function in written.functions} == {"mtl_export"}
    profile = default_profile(path, max_batch=4)
    return build_engine(
        path, folder / "model.engine", BuildOptions([profile]), library_name="tensorrt_rtx"
    )


@pytest.mark.parametrize(
    ("dtype", "name"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_single_graph_becomes_an_engine(
    traced: TracedModel, bound: BoundModel, tmp_path: Path, dtype: str, name: str
) -> None:
    """Precision is what the graph says; the task table goes with the engine."""
    model = routed_graph(traced, bound)
    if dtype != "fp32":
        model = PrecisionPass(dtype)(model).model
    manifest = engine_of(model, bound, tmp_path)
    assert name in manifest.precision
    assert [task["name"] for task in manifest.tasks] == [one.name for one in bound.adapters.tasks]
    # A graph of narrow weights may compute some sums in float32, never the other way round.
    assert set(manifest.precision) <= {name, "float32"}


@pytest.mark.parametrize(("number", "name"), [("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_quantised_single_graph_becomes_an_engine(
    traced: TracedModel, bound: BoundModel, tmp_path: Path, number: str, name: str
) -> None:
    """Q/DQ around every base product, low-rank parts and heads in float32 beside them."""
    model = routed_graph(traced, bound)
    layers = find_layers(model)
    assert len(layers) > 5
    amax = {layer.x: 4.0 for layer in layers}
    quantised = quantise(model, QuantisationPlan(format_named(number), layers, amax))
    manifest = engine_of(quantised, bound, tmp_path)
    assert {name, "float32"} <= set(manifest.precision)
