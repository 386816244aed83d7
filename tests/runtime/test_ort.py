from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import BackendMissingError, EngineRunError, UsageError
from mtl_export.runtime.ort import CPU, OrtRunner, onnx_metadata, open_session, task_table

TASKS = [{"name": "a", "index": 0, "labels": ["x"], "kind": "regression"}]
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
toy (float[batch, 3] x, int64[batch] task_ids) => (float[batch, 3] y, int64[batch] z)
{
    y = Add (x, w)
    z = Neg (task_ids)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a file with external data and metadata."""
    proto = onnx.parser.parse_model(GRAPH)
    weight = np.array([[1.5, -2.0, 0.25]], np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.helper.set_model_props(proto, {"mtl_export.tasks": json.dumps(TASKS), "other": "1"})
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def inputs(rows: int) -> dict[str, np.ndarray]:
    """Return inputs of ``rows`` rows."""
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return {"x": x, "task_ids": np.arange(rows)}


@pytest.mark.parametrize("providers", [None, [], "cpu", "CPU", ["cpu"], CPU, (CPU, "cpu")])
def test_one_provider_alone_is_a_name(model: Path, providers: str | list[str] | None) -> None:
    """A text is not taken for a list of its letters."""
    assert open_session(model, providers=providers).get_providers() == [CPU]


@pytest.mark.parametrize("providers", [[("cuda", {})], [None], [1]])
def test_what_is_no_providers_name_is_refused(model: Path, providers: list[str]) -> None:
    """Options of a provider too, which ONNX Runtime itself takes."""
    with pytest.raises(UsageError, match="providers: "):
        open_session(model, providers=providers)


@pytest.mark.parametrize("threads", ["2", -1, 1.0, True, None])
def test_threads_that_are_no_number_are_refused(model: Path, threads: int) -> None:
    """With what was passed."""
    with pytest.raises(UsageError) as caught:
        open_session(model, threads=threads)
    assert caught.value.problem == f"threads: {threads!r}"


@pytest.mark.parametrize("threads", [0, 1])
def test_outputs_come_by_name_in_float64(model: Path, threads: int) -> None:
    """Floating outputs are widened, integers stay, any batch runs."""
    with OrtRunner(model, threads=threads) as runner:
        assert runner.inputs == ("x", "task_ids")
        assert runner.metadata["other"] == "1"
        for rows in (1, 4):
            outputs = runner.infer(inputs(rows))
            assert list(outputs) == ["y", "z"]
            assert outputs["y"].dtype == np.float64
            assert outputs["z"].dtype == np.int64
            np.testing.assert_array_equal(outputs["y"], inputs(rows)["x"] + [1.5, -2.0, 0.25])


def test_a_missing_package_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without onnxruntime the error names the extra, not an ImportError."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissingError) as caught, OrtRunner(model):
        pass
    assert caught.value.problem.startswith("onnxruntime")
    assert caught.value.problem.endswith("not installed")
    assert "mtl-export[cpu]" in caught.value.fix


@pytest.mark.parametrize("fault", ["gone", "text", "no data", "short data"])
def test_a_file_that_cannot_be_opened_is_refused(model: Path, fault: str) -> None:
    """A missing, foreign or incomplete file is an EngineRunError with the path and the cause."""
    data = model.with_name("model.onnx.data")
    if fault == "gone":
        model.unlink()
    elif fault == "text":
        model.write_text("not a graph")
    elif fault == "no data":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:4])
    with pytest.raises(EngineRunError) as caught, OrtRunner(model):
        pass
    assert caught.value.problem.startswith(str(model))
    assert "onnxruntime cannot open it" in caught.value.problem
    assert "external data" in caught.value.expected
    assert "--force" in caught.value.fix
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": np.ones((2, 3), np.float32)},
        {"x": np.ones((2, 3)), "task_ids": np.arange(2)},
        {"x": np.ones((2, 4), np.float32), "task_ids": np.arange(2)},
        {**inputs(2), "unknown": np.arange(2)},
    ],
    ids=["missing", "dtype", "shape", "unknown"],
)
def test_wrong_inputs_are_an_error(model: Path, wrong: dict[str, np.ndarray]) -> None:
    """Inputs that the graph does not take are refused, never left out or cast."""
    with OrtRunner(model) as runner, pytest.raises(EngineRunError, match="cannot run it"):
        runner.infer(wrong)


def test_metadata_is_read_without_the_weights(model: Path) -> None:
    """The task table is in the graph file alone."""
    model.with_name("model.onnx.data").unlink()
    metadata = onnx_metadata(model)
    assert metadata["other"] == "1"
    assert task_table(metadata) == tuple(map(Task.from_entry, TASKS))
    assert task_table({}) == ()


@pytest.mark.parametrize("content", [None, b"not a graph at all"])
def test_metadata_of_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing or foreign file is an EngineRunError."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineRunError) as caught:
        onnx_metadata(path)
    assert caught.value.problem.startswith(str(path))
    assert "not an ONNX file" in caught.value.problem
