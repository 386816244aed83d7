"""Every verb on an MTLoRA file: the same commands, and a verdict that sees planted faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import mtl_export as mx
from mtl_export.api.parity import ParityResult
from mtl_export.dense.merged import load_dense
from mtl_export.errors import CheckpointError, UsageError
from tests.dense.checkpoints import CHANNELS, TASKS, Recipe, checkpoint_file, configuration, state
from tests.dense.plain_forward import PlainSwin
from tests.fixtures.folder import FIXTURES, needs

MODES = {
    "matrix": Recipe(),
    "matrixv2": Recipe("matrixv2"),
    "addition": Recipe("addition"),
    "lora_only": Recipe("lora_only"),
    "plus": Recipe(merging=True, trained_scale=True),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MODES if name != "matrix"]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of mode matrix, exported in every way."""
    folder = tmp_path_factory.mktemp("matrix")
    return exported(folder, MODES["matrix"])


def exported(folder: Path, recipe: Recipe) -> Path:
    """Export a toy in every way under ``folder``/out."""
    file, out = checkpoint_file(folder, recipe), folder / "out"
    mx.merge(file, output=out / "merged")
    mx.export_onnx(file, output=out / "onnx")
    mx.export_onnx(file, output=out / "onnx", tasks=["sal"])
    return folder


def judged(folder: Path, **given: Any) -> ParityResult:
    """Return parity's verdict on a folder of ``exported``."""
    return mx.parity(folder / "ckpt_epoch_3.pth", output=folder / "out", **given)


def images(count: int) -> np.ndarray:
    """Return float32 images of noise."""
    return np.random.default_rng(count).standard_normal((count, 3, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("mode", ["matrix", *SLOW])
def test_every_mode_passes_parity(
    mode: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Folders, the graph of all tasks and a task's own, at batches that were not traced."""
    if mode == "matrix":
        folder: Path = request.getfixturevalue("matrix")
    else:
        folder = exported(tmp_path, MODES[mode])
    result = judged(folder)
    assert result.exit_code == 0, [c.reason for c in result.report.cells if c.verdict == "failed"]
    passed = [cell for cell in result.report.cells if cell.verdict == "passed"]
    assert {cell.case for cell in passed} >= {"batch of 1", "batch of 3", "batch of 5"}
    found = {(cell.artefact, cell.task) for cell in passed}
    assert found == {
        *(("merged pytorch", task) for task in TASKS),
        *(("single-graph onnx", task) for task in TASKS),
        ("per-task onnx", "sal"),
    }
    isolated = [cell for cell in passed if cell.case == "isolation"]
    assert len(isolated) == (0 if mode == "lora_only" else len(TASKS))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_session_answers_every_task_of_every_image(matrix: Path, count: int) -> None:
    """Maps by task, as the formulas give them; in parts, too."""
    session = mx.TaskSession(matrix / "out" / "onnx")
    image = images(count)
    found = session.run(image)
    assert list(found) == list(TASKS)
    parts = session.run(image, max_batch=2)
    wanted = PlainSwin(state(), Recipe())(torch.from_numpy(image).double())
    for task in TASKS:
        assert found[task].shape == (count, CHANNELS[task], 64, 64)
        assert np.abs(found[task] - wanted[task].numpy()).max() < 3e-5
        assert np.abs(parts[task] - found[task]).max() < 1e-5


def test_one_line_loads_a_merged_folder(matrix: Path) -> None:
    """What it answers is what the graph of all tasks answers for that task."""
    model = load_dense(matrix / "out" / "merged" / "normals")
    image = images(2)
    with torch.inference_mode():
        found = model(torch.from_numpy(image))
    assert list(found) == ["normals"]
    graph = mx.TaskSession(matrix / "out" / "onnx").run(image)
    assert np.abs(found["normals"].numpy() - graph["normals"]).max() < 1e-5


def test_one_tasks_graph_holds_nothing_of_others(matrix: Path) -> None:
    """No output, no name, no slice of another task."""
    model = onnx.load(matrix / "out" / "onnx" / "sal" / "model.onnx")
    assert [one.name for one in model.graph.output] == ["sal"]
    names = " ".join(one.name for one in model.graph.initializer)
    assert "semseg" not in names
    assert "normals" not in names
    slices = {one.dims[0] for one in model.graph.initializer if ".task_" in one.name}
    assert slices == {1}


def test_a_graph_names_modules_and_no_file_of_this_machine(matrix: Path) -> None:
    """Weights are called after their layers; traces of the exporter are gone."""
    path = matrix / "out" / "onnx" / "model.onnx"
    names = {one.name for one in onnx.load(path).graph.initializer}
    assert "backbone.layers.0.blocks.0.mlp.fc1.weight_t" in names
    assert "backbone.layers.0.blocks.1.mlp.fc1.task_up" in names
    content = path.read_bytes()
    assert b".py" not in content
    assert b"torch.onnx" not in content


def perturbed(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Change tensors of the graph of all tasks, and its manifest with them."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        changed = change(tensor.name, value)
        if changed is not value:
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, path)


def other_up(name: str, value: np.ndarray) -> np.ndarray:
    """Give every task another's up-projections in the third stage."""
    is_meant = "layers.2" in name and name.endswith("task_up")
    return np.roll(value, 1, 0) if is_meant else value


def larger_down(name: str, value: np.ndarray) -> np.ndarray:
    """Leave out a scale: 1 percent of one task in the first stage."""
    if "layers.0" not in name or not name.endswith("fc2.task_down"):
        return value
    scale = np.ones((len(value), 1, 1, 1), value.dtype)
    scale[2] = 1.01
    return value * scale


@pytest.mark.parametrize(
    ("change", "failing", "stage"), [(other_up, TASKS, 2), (larger_down, ("sal",), 0)]
)
def test_a_planted_fault_fails_and_is_found(
    matrix: Path, tmp_path: Path, change: Callable[[str, np.ndarray], np.ndarray],
    failing: tuple[str, ...], stage: int,
) -> None:  # fmt: skip
    """The tasks it touches fail, the others pass, and the stage is named."""
    graphs = tmp_path / "graphs"
    shutil.copytree(matrix / "out" / "onnx", graphs)
    shutil.rmtree(graphs / "sal")
    (graphs / "mtl-export.json").unlink()
    perturbed(graphs, change)
    result = judged(matrix, onnx=graphs, quick=True)
    cells = [one for one in result.report.cells if one.artefact == "single-graph onnx"]
    assert {one.task for one in cells if one.verdict == "failed"} == set(failing)
    assert result.exit_code == 3
    (where,) = result.report.localised
    for task in failing:
        finding = where.finding(task)
        assert finding is not None
        assert finding.layer == f"stage{stage}.{task}"
    assert {np.shape(grid) for grid in where.maps.values()} == {(8, 8)}
    worst = {task: float(np.max(grid)) for task, grid in where.maps.items()}
    assert {task for task, floors in worst.items() if floors > 8} == set(failing)
    faulty = {one.layer for one in where.layers if one.verdict == "faulty"}
    assert faulty == {f"stage{stage}.{task}" for task in failing}


def test_golden_vectors_let_verify_run_the_graph_again(matrix: Path) -> None:
    """Each task's map of an image is kept beside the graph."""
    result = judged(matrix, golden=True, quick=True)
    assert len(result.golden) == 2
    checks = mx.verify(matrix / "out", require_run=True).checks
    golden = [one for one in checks if one.kind == "golden" and one.folder.startswith("onnx")]
    assert [one.verdict for one in golden] == ["passed"] * (len(TASKS) + 1)


def test_postprocessed_maps_are_what_users_look_at(tmp_path: Path) -> None:
    """Classes, 0 to 255, and normals as bytes with channels last; parity judges them, too."""
    file = checkpoint_file(tmp_path)
    mx.export_onnx(file, output=tmp_path / "out" / "onnx", postprocess=True)
    image = images(2)
    found = mx.TaskSession(tmp_path / "out" / "onnx").run(image)
    raw = {
        k: v.numpy()
        for k, v in PlainSwin(state(), Recipe())(torch.from_numpy(image).double()).items()
    }
    assert found["semseg"].dtype == np.int64
    assert np.array_equal(found["semseg"], raw["semseg"].argmax(1))
    assert np.abs(found["sal"] - 255 / (1 + np.exp(-raw["sal"][:, 0]))).max() < 1e-2
    length = np.sqrt((raw["normals"] ** 2).sum(1, keepdims=True))
    bytes_ = ((raw["normals"] / length + 1) * 127.5).transpose(0, 2, 3, 1)
    assert np.abs(found["normals"] - bytes_).max() < 1e-2
    result = judged(tmp_path, quick=True)
    assert result.exit_code == 0
    assert {c.task for c in result.report.cells if c.verdict == "passed"} == set(TASKS)


REFUSED = [
    ({"base": "bert"}, "--base"),
    ({"alpha": 16.0}, "--alpha"),
    ({"task_input": "scalar"}, "answered by every task"),
    ({"pooling": "mean"}, "--pooling"),
    ({"dtype": "fp16"}, "--dtype"),
    ({"layout": "adapter-input"}, "--layout"),
    ({"link_data": True}, "--link-data"),
    ({"tasks": ["depth"]}, "depth"),
    ({"image_size": 100}, "--image-size"),
]


@pytest.mark.parametrize(("given", "found"), REFUSED)
def test_what_says_nothing_about_images_is_refused(
    tmp_path: Path, given: dict[str, Any], found: str
) -> None:
    """One message each, before anything is written."""
    file = checkpoint_file(tmp_path)
    with pytest.raises(UsageError) as caught:
        mx.export_onnx(file, output=tmp_path / "out", **given)
    assert found in str(caught.value)
    assert not (tmp_path / "out").exists()


def stripped(folder: Path) -> Path:
    """Write a state dict alone; return the file."""
    folder.mkdir(exist_ok=True)
    torch.save(state(), folder / "model.pth")
    return folder / "model.pth"


def test_a_stripped_file_needs_its_configuration(tmp_path: Path) -> None:
    """The refusal says what to type, and that works."""
    file = stripped(tmp_path)
    with pytest.raises(CheckpointError, match="no configuration") as caught:
        mx.inspect(file)
    assert "--config run.yaml" in caught.value.fix
    (tmp_path / "run.yaml").write_text(json.dumps(configuration()))
    found = mx.inspect(file, train_config=tmp_path / "run.yaml")
    assert found.missing == ()
    assert not found.report["unsupported"]
    assert [task["name"] for task in found.report["tasks"]] == list(TASKS)


def test_a_configuration_beside_one_in_the_file_is_refused(tmp_path: Path) -> None:
    """What was trained with decides."""
    (tmp_path / "run.yaml").write_text("MODEL: {}")
    with pytest.raises(UsageError, match="holds its own configuration"):
        mx.inspect(checkpoint_file(tmp_path), train_config=tmp_path / "run.yaml")


@pytest.mark.parametrize("settings", [{"SPLIT_QKV": True}, {"SHARED_MODE": "gated"}])
def test_settings_that_cannot_be_built_are_refused(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """By name."""
    file = checkpoint_file(tmp_path, Recipe(settings=settings))
    with pytest.raises(CheckpointError, match=next(iter(settings))):
        mx.export_onnx(file, output=tmp_path / "out")


@pytest.mark.fixtures
@needs("mtlora")[1]
def test_the_trainers_file_exports_to_what_its_code_answers(tmp_path: Path) -> None:
    """Within 3e-5 of the authors' arrays."""
    file = FIXTURES / "mtlora" / "matrix" / "ckpt_epoch_0.pth"
    mx.export_onnx(file, output=tmp_path / "onnx")
    stored = np.load(file.with_name("reference.npz"))
    found = mx.TaskSession(tmp_path / "onnx").run(stored["image"])
    assert len(found) == 4
    assert all(np.abs(v - stored[f"out_{task}"]).max() < 3e-5 for task, v in found.items())


@pytest.mark.parametrize("mode", ["matrix", pytest.param("addition", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gone", ["semseg", "normals"])
def test_a_task_is_removed_from_the_graph_of_all(
    matrix: Path, tmp_path: Path, mode: str, gone: str
) -> None:
    """Its output and slices go, the others answer as before, and parity still passes."""
    source = matrix if mode == "matrix" else exported(tmp_path / "other", MODES[mode])
    graphs = tmp_path / "graphs"
    shutil.copytree(source / "out" / "onnx", graphs)
    shutil.rmtree(graphs / "sal")
    image = images(3)
    before = mx.TaskSession(graphs).run(image)
    edited = mx.remove_task(graphs, gone)
    left = [task for task in TASKS if task != gone]
    assert [task.name for task in edited.after] == left
    after = mx.TaskSession(graphs).run(image)
    assert list(after) == left
    assert all(np.abs(after[task] - before[task]).max() < 1e-5 for task in left)
    model = onnx.load(graphs / "model.onnx")
    slices = {one.dims[0] for one in model.graph.initializer if ".task_" in one.name}
    assert slices == {len(left) if mode == "matrix" else len(TASKS)}
    assert mx.verify(graphs).exit_code == 0
    result = judged(source, onnx=graphs, quick=True)
    assert result.exit_code == 0
    cells = [one for one in result.report.cells if one.artefact == "single-graph onnx"]
    assert {one.task for one in cells} == set(left)


@pytest.mark.parametrize(("verb", "call"), [("rename", mx.rename_task), ("add", mx.add_task)])
def test_other_edits_of_a_graph_of_images_are_refused(
    matrix: Path, verb: str, call: Callable[..., object]
) -> None:
    """With what can be done."""
    given = {"checkpoint": "adapter"} if verb == "add" else {"new": "saliency"}
    with pytest.raises(UsageError, match=f"tasks {verb}"):
        call(matrix / "out" / "onnx", "sal", **given)


def test_bench_measures_what_was_exported(matrix: Path) -> None:
    """Graphs and the unmerged model, one image at a time."""
    result = mx.bench(matrix / "ckpt_epoch_3.pth", output=matrix / "out", rounds=1, threads=1)
    subjects = [timing.subject for timing in result.measured.timings]
    assert subjects == ["per-task onnx", "single-graph onnx", "eager pytorch unmerged"]
    with pytest.raises(UsageError, match="images x 64 pixels"):
        mx.bench(matrix / "ckpt_epoch_3.pth", output=matrix / "out", shapes="1x32")
