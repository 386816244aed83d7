"""What graphs take and give: one task for the batch, sentence embeddings, hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from tests.adapters import toys
from tests.cli.conftest import Run
from tests.factories import HIDDEN, INTERMEDIATE, toy_base

TASKS = (Task("search", 0), Task("cluster", 1))
LAYERS = {
    "encoder.layer.0.attention.self.query": (HIDDEN, HIDDEN),
    "encoder.layer.1.output.dense": (HIDDEN, INTERMEDIATE),
}


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project with a bare encoder and two tasks without heads, as the current folder."""
    base = toy_base(tmp_path / "base")
    layers = {
        module: toys.layer_values(seed, inputs=shape[1], outputs=shape[0], tasks=2, dtype="F32")
        for seed, (module, shape) in enumerate(LAYERS.items(), start=3)
    }
    write_folder(
        tmp_path / "adapter", tasks=TASKS, layers=layers, heads={}, alpha=7.0, temperature=0.3,
        model_class="BertModel", base=BaseReference("base", open_base(str(base)).sha256),
    )  # fmt: skip
    (tmp_path / "mtl-export.toml").write_text('base = "base"\ncheckpoint = "adapter"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_encoder_gives_what_is_asked_for(encoder: Path, run: Run) -> None:
    """Pooled vectors of length 1 from one task a batch; merged folders keep their states."""
    form = ("--task-input", "scalar", "--pooling", "mean", "--normalize")
    assert run("onnx", "--all-tasks", *form).code == 0
    assert run("merge", "--all-tasks").code == 0
    again = run("onnx", "--all-tasks", *form, "--json")
    assert again.json["outputs"][0]["status"] == "up to date"
    session = onnxruntime.InferenceSession(str(encoder / "out/onnx/model.onnx"))
    ids = np.array([[2, 9, 8, 3], [2, 7, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0) * 1, "token_type_ids": ids * 0}
    (vectors,) = session.run(None, {**inputs, "task_ids": np.array([1])})
    assert [value.name for value in session.get_outputs()] == ["sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["mtl_export.embedding"] == '{"pooling": "mean", "normalize": true}'
    assert metadata["mtl_export.task_input"] == "scalar"
    report = run("parity", "--json").json
    assert report["ok"], [cell for cell in report["cells"] if cell["verdict"] == "failed"]
    passed = {
        (cell["artefact"], cell["case"].partition(", ")[2])
        for cell in report["cells"]
        if cell["verdict"] == "passed" and cell["case"].startswith("task 0")
    }
    assert passed == {
        ("merged pytorch", "last_hidden_state"),
        ("merged pytorch", "pooler_output"),
        ("single-graph onnx", ""),
    }


def test_lengths_need_vectors(encoder: Path, run: Run) -> None:
    """--normalize alone asks for nothing that could be normalised."""
    outcome = run("onnx", "--all-tasks", "--normalize")
    assert outcome.code == 2
    assert "Add --pooling" in outcome.stderr


def test_engines_of_merged_graphs_take_no_task(project: Path, run: Run) -> None:
    """What would have no effect is refused, as onnx refuses it."""
    outcome = run("trt", "--task", "spam", "--task-input", "scalar")
    assert outcome.code == 2
    assert "--task-input scalar: graphs of layout per-task beside it" in outcome.stderr
