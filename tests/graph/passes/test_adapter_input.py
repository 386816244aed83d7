"""Tasks as ONNX Runtime's adapters: the base without one, each task with its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError
from mtl_export.graph.adapter_parameters import Parameter
from mtl_export.graph.lower import adapter_input_graph
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graphs
from mtl_export.runtime.onnx_adapters import AdapterRunner, active, adapter_file, write_adapter
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import OracleRunner
from tests.adapters import toys
from tests.graph import marked

ATOL = 3e-5


def write(bound: BoundModel, traced: TracedModel, folder: Path) -> tuple[Parameter, ...]:
    """Write graph and adapters; return the graph's optional inputs."""
    model, parameters = adapter_input_graph(traced, bound)
    write_graphs({"model": model}, bound, folder, None)
    for task in bound.adapters.tasks:
        values = {p.name: p.value(task.index).astype(np.float32) for p in parameters}
        write_adapter(folder / adapter_file("model", task.name), values)
    return parameters


@pytest.fixture(scope="module")
def folder(
    bound: BoundModel, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of the toy checkpoint."""
    made = tmp_path_factory.mktemp("adapters")
    write(bound, traced, made)
    return made


def session(folder: Path) -> onnxruntime.InferenceSession:
    """Return a bare session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def test_switching_adapters_gives_each_tasks_own_answers(
    folder: Path, merged_folders: list[Path], bound: BoundModel
) -> None:
    """One session, back and forth between tasks: the merged graph's numbers, and the oracle's."""
    opened, inputs = session(folder), toys.token_rows(4, 9)
    for index in (0, 2, 1, 0):
        task = bound.adapters.tasks[index]
        adapter = active(folder / adapter_file("model", task.name))
        (found,) = opened.run(["logits"], inputs, adapter.options)
        with OrtRunner(merged_folders[index] / "model.onnx", threads=1) as runner:
            merged = runner.infer(inputs)["logits"]
        width = len(task.labels)
        np.testing.assert_allclose(found[:, :width], merged, atol=ATOL)
        assert np.isneginf(found[:, width:]).all()
        with OracleRunner(bound, "fp64") as oracle:
            expected = oracle.infer({**inputs, "task_ids": np.full(4, index)})["logits"]
        np.testing.assert_allclose(found[:, :width], expected[:, :width], atol=ATOL)


def test_without_an_adapter_it_is_the_base_whose_head_answers_nan(
    folder: Path, bound: BoundModel, traced: TracedModel
) -> None:
    """Given a head alone, as an ordinary input, the body is the untouched base's."""
    opened, inputs = session(folder), toys.token_rows(4, 9)
    (bare,) = opened.run(["logits"], inputs)
    assert np.isnan(bare).all()
    _, parameters = adapter_input_graph(traced, bound)
    head = {p.name: p.value(1).astype(np.float32) for p in parameters if p.module == toys.HEAD}
    (found,) = opened.run(["logits"], {**inputs, **head})
    np.testing.assert_allclose(found, base_logits(bound, inputs), atol=ATOL)


def base_logits(bound: BoundModel, inputs: dict[str, Array]) -> Array:
    """Return what transformers' own base says under the second task's head."""
    import torch
    from transformers import BertModel

    head = bound.adapters.heads[toys.HEAD][1]
    model = BertModel.from_pretrained(bound.base.folder).eval()
    with torch.no_grad():
        pooled = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).pooler_output
    logits: Array = pooled.numpy() @ head.weight.T + head.bias
    return logits


def test_the_files_pass_every_check_and_are_the_same_every_time(
    folder: Path, bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """The full checks of onnx and onnx-ir, shape inference; another run writes equal bytes."""
    path = str(folder / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes_path(path, str(tmp_path / "inferred.onnx"), True, True)
    model = ir.external_data.load_to_model(ir.load(path))
    common.CheckerPass(full_check=True)(model)
    names = {value.name for value in session(folder).get_overridable_initializers()}
    assert names == {*(f"{m}.core" for m in toys.MODULES), "classifier.weight_t", "classifier.bias"}
    (tmp_path / "again").mkdir()
    write(bound, traced, tmp_path / "again")
    for file in sorted((tmp_path / "again").iterdir()):
        digests = {hashlib.sha256((f / file.name).read_bytes()).hexdigest()
                   for f in (folder, file.parent)}  # fmt: skip
        assert len(digests) == 1, file.name


def test_a_runner_serves_mixed_batches_as_the_single_graph_does(
    folder: Path, routed_folder: Path
) -> None:
    """Rows by task, an unknown id NaN, nothing but unknown ids NaN as well."""
    for ids in ([0, 2, 1, 2, 0, 1], [1, 1, 3, -1], [7, 9]):
        inputs = {**toys.token_rows(len(ids), 9), "task_ids": np.array(ids)}
        with AdapterRunner(folder / "model.onnx", threads=1) as runner:
            assert "task_ids" in runner.inputs
            found = runner.infer(inputs)["logits"]
        with OrtRunner(routed_folder / "model.onnx", threads=1) as runner:
            expected = runner.infer(inputs)["logits"]
        np.testing.assert_allclose(found, expected, atol=ATOL)
    (folder / "broken.onnx_adapter").write_bytes(b"broken")
    with pytest.raises(EngineRunError, match="onnxruntime cannot load it"):
        active(folder / "broken.onnx_adapter")
    (folder / "broken.onnx_adapter").unlink()


def test_the_graph_and_its_parameters_are_the_layers_of_the_pattern() -> None:
    """Base products stay stock; cores and heads alone are inputs; biases come last."""
    bound = marked.bound()
    traced = TracedModel(marked.model(), tuple(marked.SIZES), (marked.HEAD,))
    model, parameters = adapter_input_graph(traced, bound)
    assert [one.name for one in parameters] == [
        "enc.wide.core", "enc.narrow.core", "pool.core", "head.weight_t", "head.bias",
    ]  # fmt: skip
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert marked.counts(model)["", "MatMul"] == 4 * len(marked.SIZES) + 1
    inputs = {"x": np.random.default_rng(2).normal(size=(5, 4, 5)).astype(np.float32)}
    for task in marked.TASKS:
        values = {p.name: p.value(task.index).astype(np.float32) for p in parameters}
        for value in model.graph.initializers.values():
            if value.name in values:
                value.const_value = ir.tensor(values[value.name], name=value.name)
        found = marked.evaluate(model, **inputs)
        expected = marked.logits(inputs["x"], np.full(5, task.index))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
