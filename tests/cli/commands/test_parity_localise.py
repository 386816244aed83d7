"""``parity`` after a failure names the layer; ``--bisect`` the layers that need float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mtl_export.graph.passes.precision import PrecisionPass
from tests.cli.conftest import Run

LAYER = "bert.encoder.layer.1.attention.self.value"
SAID = f"single-graph onnx, task topic: {LAYER} is wrong: the adapter of task ads_rel"


@pytest.fixture
def graph(exported: Path) -> Path:
    """Return the single graph of a project, its manifest gone: it is taken as it is."""
    folder = exported / "out" / "onnx"
    (folder / "mtl-export.json").unlink()
    return folder / "model.onnx"


def rewrite(path: Path, model: ir.Model) -> None:
    """Write a changed graph; the data of unchanged tensors stay where they are."""
    path.unlink()
    ir.save(model, path)


def test_a_failure_says_where_and_why(graph: Path, run: Run) -> None:
    """In words, in a table and in every field of the report; on request not at all."""
    model = ir.load(graph)
    stack = model.graph.initializers[f"{LAYER}.core"]
    assert stack.const_value is not None
    values = stack.const_value.numpy().copy()
    values[1] = values[0]
    stack.const_value = ir.tensor(values, name=stack.name)
    rewrite(graph, model)
    outcome = run("parity", "--quick", "--threads", "1", "--report", "parity.json")
    assert outcome.code == 3
    assert SAID in outcome.stdout
    assert "layers of single-graph onnx" in outcome.stdout
    report = json.loads(Path("parity.json").read_text())
    (found,) = report["localised"]
    wrong = [(e["layer"], e["task"]) for e in found["layers"] if e["verdict"] == "faulty"]
    assert wrong == [(LAYER, "topic")]
    silent = run("parity", "--quick", "--threads", "1", "--no-localise", "--json")
    assert (silent.code, silent.json["localised"]) == (3, [])


def test_bisect_names_the_layers_that_need_float32(graph: Path, run: Run) -> None:
    """A float16 graph held to half of what its rounding costs."""
    model = ir.load(graph)
    PrecisionPass("fp16")(model)
    rewrite(graph, model)
    passed = run("parity", "--quick", "--threads", "1", "--json")
    assert passed.code == 0
    assert passed.json["localised"] == []
    error = max(cell["max_abs_error"] or 0.0 for cell in passed.json["cells"]
                if cell["artefact"] == "single-graph onnx" and cell["decisions"])  # fmt: skip
    words = ("--atol", f"{error * 0.9:.9f}", "--rtol", "0")
    outcome = run("parity", "--quick", "--threads", "1", "--bisect", "--json", *words)
    assert outcome.code == 3
    (found,) = outcome.json["localised"]
    assert {layer["verdict"] for layer in found["layers"]} == {"within"}
    bisection = found["bisection"]
    assert bisection["error"] > 1
    assert bisection["error_wide"] is not None
    assert bool(bisection["layers"]) == (bisection["error_wide"] <= 1)
    assert np.isfinite(bisection["error_wide"])
