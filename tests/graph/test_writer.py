from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import CheckerPass

from mtl_export.adapters.binding import BoundModel
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graph
from mtl_export.names import DATA_FILE, MODEL_FILE
from tests.adapters import toys

REPOSITORY = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_written_graphs_pass_onnxs_full_check(
    routed_folder: Path, merged_folders: list[Path]
) -> None:
    """The checker accepts every file, shapes inferred, external data found."""
    for folder in (routed_folder, *merged_folders):
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)


BARE = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
rows = {value.name: numpy.ones((2, 5) if len(value.shape) == 2 else (2,), numpy.int64)
        for value in session.get_inputs()}
assert numpy.isfinite(session.run(["logits"], rows)[0][:, 0]).all()
assert not {"torch", "transformers", "onnx", "onnx_ir", "mtl_export"} & set(sys.modules)
"""


def test_other_tools_take_the_written_graphs(
    routed_folder: Path, merged_folders: list[Path], tmp_path: Path
) -> None:
    """The check of onnx-ir, shape inference by file, ONNX Runtime with numpy alone."""
    for folder in (routed_folder, merged_folders[0]):
        path = str(folder / MODEL_FILE)
        CheckerPass(full_check=True)(ir.external_data.load_to_model(ir.load(path)))
        onnx.shape_inference.infer_shapes_path(path, str(tmp_path / "inferred.onnx"), True, True)
        subprocess.run([sys.executable, "-c", BARE, path], cwd=tmp_path, check=True, timeout=100)


def test_the_folder_holds_graph_data_config_and_tokenizer(
    routed_folder: Path, merged_folders: list[Path]
) -> None:
    """Weights lie beside the graph; the tokenizer and config travel along."""
    for folder in (routed_folder, merged_folders[0]):
        names = {path.name for path in folder.iterdir()}
        assert {MODEL_FILE, DATA_FILE, "config.json", "tokenizer.json"} <= names
        graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {DATA_FILE}


def test_configs_say_what_the_graph_serves(routed_folder: Path, merged_folders: list[Path]) -> None:
    """A merged graph's config has its task's labels; the single graph's only the class."""
    routed = json.loads((routed_folder / "config.json").read_text())
    merged = json.loads((merged_folders[1] / "config.json").read_text())
    for config in (routed, merged):
        assert config["architectures"] == ["BertForSequenceClassification"]
    assert "id2label" not in routed
    assert merged["id2label"] == {"0": "ads", "1": "jobs", "2": "news", "3": "sport"}
    assert merged["problem_type"] == "multi_label_classification"


def test_inputs_and_outputs_are_the_contract(
    routed_folder: Path, merged_folders: list[Path]
) -> None:
    """Names, types and dimensions are those that users and engine builders rely on."""
    for folder, width, own in ((routed_folder, 4, ["task_ids"]), (merged_folders[2], 1, [])):
        graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
        found = {value.name: value.type.tensor_type for value in graph.input}
        assert set(found) == {"input_ids", "attention_mask", "token_type_ids", *own}
        for name, kind in found.items():
            assert kind.elem_type == onnx.TensorProto.INT64
            dims = [dim.dim_param for dim in kind.shape.dim]
            assert dims == (["batch"] if name == "task_ids" else ["batch", "sequence"])
        (logits,) = graph.output
        assert logits.name == "logits"
        first, second = logits.type.tensor_type.shape.dim
        assert (first.dim_param, second.dim_value) == ("batch", width)


def test_custom_ops_come_with_their_bodies(routed_folder: Path) -> None:
    """The file itself defines every op that is not standard."""
    model = onnx.load(str(routed_folder / MODEL_FILE), load_external_data=False)
    defined = {(function.domain, function.name) for function in model.functions}
    used = {(node.domain, node.op_type) for node in model.graph.node if node.domain}
    assert used
    assert used == defined
    assert {node.domain for function in model.functions for node in function.node} == {""}


def test_every_stack_in_the_file_ends_in_nan(routed_folder: Path) -> None:
    """What is gathered by id has T + 1 slices, the last one NaN."""
    model = onnx.load(str(routed_folder / MODEL_FILE))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    stacks = [f"{module}.core" for module in toys.MODULES]
    for name in [*stacks, "classifier.weights", "classifier.biases"]:
        assert len(arrays[name]) == len(toys.TASKS) + 1
        assert np.isnan(arrays[name][-1]).all()
        assert not np.isnan(arrays[name][:-1]).any()


def test_writing_twice_gives_the_same_bytes(
    bound: BoundModel,
    traced: TracedModel,
    routed_folder: Path,
    merged_folders: list[Path],
    tmp_path: Path,
) -> None:
    """Lowering and writing again changes no byte of any file."""
    (tmp_path / "routed").mkdir()
    write_graph(routed_graph(traced, bound), bound, tmp_path / "routed", None)
    assert hashes(tmp_path / "routed") == hashes(routed_folder)
    task = toys.TASKS[1]
    (tmp_path / "merged").mkdir()
    model = merged_graph(traced, bound, task)
    write_graph(model, bound, tmp_path / "merged", task)
    assert hashes(tmp_path / "merged") == hashes(merged_folders[1])
    (tmp_path / "again").mkdir()
    write_graph(model, bound, tmp_path / "again", task)
    assert hashes(tmp_path / "again") == hashes(merged_folders[1])


ANOTHER_PROCESS = """
import sys
from pathlib import Path
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from tests.adapters import toys
bound = toys.bound_model(Path(sys.argv[1]), Path(sys.argv[2]))
write_graph(routed_graph(trace(bound), bound), bound, Path(sys.argv[3]), None)
"""


def test_another_process_in_another_place_gives_the_same_bytes(
    bound: BoundModel, routed_folder: Path, tmp_path: Path
) -> None:
    """A new trace under another hash seed, folder and user changes no byte."""
    environment = {
        **os.environ, "PYTHONHASHSEED": "12345", "USER": "somebody", "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(str(REPOSITORY / p) for p in (".", "cli", "calibration")),
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    arguments = [str(bound.base.folder), str(bound.checkpoint.path), str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, *arguments],
        cwd=tmp_path, env=environment, check=True, timeout=200,
    )  # fmt: skip
    assert hashes(tmp_path / "out") == hashes(routed_folder)


@pytest.mark.parametrize("file", [MODEL_FILE, "config.json"])
def test_nothing_of_this_machine_is_in_the_file(
    bound: BoundModel, routed_folder: Path, merged_folders: list[Path], file: str
) -> None:
    """No path, source line or host name is written."""
    traces = [str(bound.base.folder), str(bound.checkpoint.path), str(REPOSITORY), "site-packages",
              ".py", sys.prefix, socket.gethostname()]  # fmt: skip
    for folder in (routed_folder, *merged_folders):
        content = (folder / file).read_bytes()
        assert not [trace for trace in traces if trace.encode() in content]
