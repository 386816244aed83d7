"""Weights beside graphs: each once, at the right place, the same bytes for every task."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.external_data import (
    INLINE_BYTES,
    PAGE_BYTES,
    SHARED_FILE,
    DataFile,
    SharedData,
    externalised,
    write_data,
)
from mtl_export.graph.lower import merged_graph
from mtl_export.graph.passes.precision import PrecisionPass
from mtl_export.graph.passes.weights import add_initializer
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graphs
from mtl_export.names import DATA_FILE, MODEL_FILE
from mtl_export.runtime.ort import OrtRunner
from tests.adapters import toys


def tensor(*shape: int, seed: int = 0, dtype: Any = np.float32) -> ir.TensorProtocol:
    """Return seeded values."""
    return ir.tensor(np.random.default_rng(seed).integers(-99, 99, shape).astype(dtype))


def graph_of(**values: Array) -> ir.Model:
    """Return a graph that only has initializers."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="weights")
    for name, value in values.items():
        add_initializer(graph, name, value.shape, lambda value=value: value)  # type: ignore[misc]
    return ir.Model(graph, ir_version=10)


def export(
    bound: BoundModel, traced: TracedModel, parent: Path, order: list[int], *, is_linked: bool
) -> dict[int, Path]:
    """Write merged graphs in this order of tasks, as one export does."""
    shared = SharedData(is_linked=is_linked)
    folders = {}
    for index in order:
        task = bound.adapters.tasks[index]
        folders[index] = parent / task.name
        folders[index].mkdir(parents=True)
        models = {"model": merged_graph(traced, bound, task)}
        files = write_graphs(models, bound, folders[index], task, shared)
        for name, file in files.items():
            content = (folders[index] / name).read_bytes()
            assert file.sha256 == hashlib.sha256(content).hexdigest()
            assert file.size_bytes == len(content)
        shared.settle(folders[index])
    return folders


def locations(path: Path) -> dict[str, tuple[str, int, int]]:
    """Return file, offset and length of every external initializer."""
    model = onnx.load(str(path), load_external_data=False)
    found = {}
    for one in model.graph.initializer:
        if one.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in one.external_data}
            found[one.name] = (
                entries["location"], int(entries["offset"]), int(entries["length"])
            )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def folders(
    bound: BoundModel, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Return the folders of all tasks."""
    return export(bound, traced, tmp_path_factory.mktemp("all"), [0, 1, 2], is_linked=False)


def test_large_tensors_begin_at_a_page_and_small_ones_at_a_line(tmp_path: Path) -> None:
    """Gaps are zeros; hash and size are those of the file."""
    tensors = [tensor(3, 5), tensor(40, 41, seed=1), tensor(7, seed=2, dtype=np.int64),
               tensor(PAGE_BYTES, seed=3, dtype=np.int8)]  # fmt: skip
    with DataFile(tmp_path / "w.data") as file:
        places = [file.add(one) for one in tensors]
        written = file.written
    assert [place.offset for place in places] == [0, 4096, 10688, 12288]
    content = (tmp_path / "w.data").read_bytes()
    assert hashlib.sha256(content).hexdigest() == written.sha256
    assert len(content) == written.size_bytes == 12288 + PAGE_BYTES
    covered = bytearray(content)
    for one, place in zip(tensors, places, strict=True):
        assert content[place.offset : place.offset + place.length] == one.tobytes()
        covered[place.offset : place.offset + place.length] = bytes(place.length)
    assert not any(covered)


def test_equal_tensors_are_stored_once_and_unequal_ones_never(tmp_path: Path) -> None:
    """The last byte decides, and so does the length; the shape does not."""
    first = tensor(100, 120)
    near = first.numpy().copy()
    near[-1, -1] += 1
    with DataFile(tmp_path / "w.data") as file:
        place = file.add(first)
        assert file.add(ir.tensor(near)) != place
        assert file.add(ir.tensor(first.numpy().reshape(120, 100))) == place
        assert file.add(ir.tensor(near)) != place
        assert file.add(ir.tensor(first.numpy()[:50])) != place
        assert file.add(ir.tensor(first.numpy().copy())) == place
        size = file.written.size_bytes
    assert size == 2 * 49152 + 24000


def test_packed_and_foreign_types_are_written_as_onnx_reads_them(tmp_path: Path) -> None:
    """4-bit, bfloat16 and transposed values come back equal."""
    values = np.arange(600).reshape(20, 30).astype(np.float32)
    four = ir.PackedTensor(
        np.arange(256, dtype=np.uint8), ir.DataType.UINT4, shape=ir.Shape([512]), name="four"
    )
    half, turned = (
        ir.tensor(values.astype(ml_dtypes.bfloat16)),
        ir.tensor(np.asfortranarray(values)),
    )
    with DataFile(tmp_path / "w.data") as file:
        for one in (four, half, turned):
            place = file.add(one)
            back = ir.ExternalTensor(
                place.file,
                place.offset,
                place.length,
                one.dtype,
                shape=ir.Shape(one.shape.numpy()),
                name="back",
                base_dir=tmp_path,
            )
            file._file.flush()
            np.testing.assert_array_equal(back.numpy(), one.numpy())


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """What is computed for the file is gone before the next is."""
    alive: list[weakref.ref[Array]] = []

    def made(seed: int) -> Array:
        assert not [one for one in alive if one() is not None]
        value = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
        alive.append(weakref.ref(value))
        return value

    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="weights")
    for seed in range(6):
        add_initializer(graph, f"w{seed}", (64, 64), lambda seed=seed: made(seed))  # type: ignore[misc]
    write_data({"model": ir.Model(graph, ir_version=10)}, tmp_path)
    assert len(alive) == 6
    assert (tmp_path / DATA_FILE).stat().st_size == 6 * 64 * 64 * 4


def test_parts_of_one_folder_share_what_they_have_in_common(
    bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """Two graphs of the same weights cost one; both pass the check and answer alike."""
    task = bound.adapters.tasks[0]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    model = merged_graph(traced, bound, task)
    write_graphs({"prefill": model}, bound, tmp_path / "one", task)
    again = merged_graph(traced, bound, task)
    files = write_graphs({"prefill": model, "decode": again}, bound, tmp_path / "two", task)
    assert set(files) == {DATA_FILE}
    one, two = ((tmp_path / name / DATA_FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    for stem in ("prefill", "decode"):
        path = tmp_path / "two" / f"{stem}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        assert locations(path) == locations(tmp_path / "one" / "prefill.onnx")


def test_the_shared_file_is_the_same_in_every_folder(folders: dict[int, Path]) -> None:
    """Embeddings, norms and untouched layers lie in it; what a task changes does not."""
    contents = {(folder / SHARED_FILE).read_bytes() for folder in folders.values()}
    assert len(contents) == 1
    inodes = {(folder / SHARED_FILE).stat().st_ino for folder in folders.values()}
    assert len(inodes) == len(folders)
    for folder in folders.values():
        places = locations(folder / MODEL_FILE)
        shared = {name for name, place in places.items() if place[0] == SHARED_FILE}
        own = {name for name, place in places.items() if place[0] == DATA_FILE}
        assert "bert.embeddings.word_embeddings.weight" in shared
        assert {f"{module}.weight_t" for module in toys.MODULES} <= own
        changed = {name for name in own if not name.startswith((*toys.MODULES, toys.HEAD))}
        assert not changed


def test_shared_or_not_the_answers_are_the_same(
    folders: dict[int, Path], merged_folders: list[Path]
) -> None:
    """Where a tensor lies changes no bit of any output."""
    inputs = toys.token_rows(4, 9)
    for index, folder in folders.items():
        with OrtRunner(folder / MODEL_FILE, threads=1) as runner:
            found = runner.infer(inputs)["logits"]
        with OrtRunner(merged_folders[index] / MODEL_FILE, threads=1) as runner:
            np.testing.assert_array_equal(found, runner.infer(inputs)["logits"])


def test_a_folder_does_not_depend_on_which_tasks_were_exported_with_it(
    bound: BoundModel, traced: TracedModel, folders: dict[int, Path], tmp_path: Path
) -> None:
    """Another first task, or fewer tasks: the same bytes."""
    for index, folder in export(bound, traced, tmp_path, [2, 0], is_linked=False).items():
        for path in folder.iterdir():
            assert path.read_bytes() == (folders[index] / path.name).read_bytes(), path.name


def test_every_tool_opens_cloned_folders(folders: dict[int, Path]) -> None:
    """The full check of onnx with shape inference, onnx-ir's check, and bare ONNX Runtime."""
    for folder in folders.values():
        path = folder / MODEL_FILE
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes_path(str(path), str(folder / "inferred.onnx"), True, True)
        (folder / "inferred.onnx").unlink()
        model = ir.external_data.load_to_model(ir.load(path))
        common.CheckerPass(full_check=True)(model)
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_linked_folders_hold_one_file_that_onnx_runtime_opens(
    bound: BoundModel, traced: TracedModel, folders: dict[int, Path], tmp_path: Path
) -> None:
    """One inode, the same bytes; a session's answers are those of a cloned folder."""
    linked = export(bound, traced, tmp_path, [0, 1, 2], is_linked=True)
    inodes = {(folder / SHARED_FILE).stat().st_ino for folder in linked.values()}
    assert len(inodes) == 1
    inputs = toys.token_rows(4, 9)
    for index, folder in linked.items():
        assert locations(folder / MODEL_FILE) == locations(folders[index] / MODEL_FILE)
        with OrtRunner(folder / MODEL_FILE, threads=1) as one, \
                OrtRunner(folders[index] / MODEL_FILE, threads=1) as other:  # fmt: skip
            np.testing.assert_array_equal(
                one.infer(inputs)["logits"], other.infer(inputs)["logits"]
            )


def test_where_links_and_kernel_copies_do_not_work_bytes_are_copied(
    bound: BoundModel,
    traced: TracedModel,
    folders: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file system without links, a kernel without copy_file_range: the same folders."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    for index, folder in export(bound, traced, tmp_path, [0, 1], is_linked=True).items():
        expected = (folders[index] / SHARED_FILE).read_bytes()
        assert (folder / SHARED_FILE).read_bytes() == expected


def test_half_precision_is_shared_as_well(
    bound: BoundModel, traced: TracedModel, tmp_path: Path
) -> None:
    """What is converted for every task alike is written once, too."""
    shared = SharedData()
    contents = set()
    for task in bound.adapters.tasks[:2]:
        (tmp_path / task.name).mkdir()
        model = PrecisionPass("fp16")(merged_graph(traced, bound, task)).model
        write_graphs({"model": model}, bound, tmp_path / task.name, task, shared)
        shared.settle(tmp_path / task.name)
        contents.add((tmp_path / task.name / SHARED_FILE).read_bytes())
        places = locations(tmp_path / task.name / MODEL_FILE)
        assert places["bert.embeddings.word_embeddings.weight"][0] == SHARED_FILE
        onnx.checker.check_model(str(tmp_path / task.name / MODEL_FILE), full_check=True)
    assert len(contents) == 1


def test_small_tensors_stay_in_the_graph_and_the_model_is_unchanged(tmp_path: Path) -> None:
    """Shapes and axes can be read without the data file; writing gives the weights back."""
    limit = INLINE_BYTES // 4
    model = graph_of(small=np.ones(limit, np.float32), large=np.ones(limit + 1, np.float32))
    before = [value.const_value for value in model.graph.initializers.values()]
    places, _ = write_data({"model": model}, tmp_path)
    with externalised({"model": model}, places):
        ir.save(model, tmp_path / MODEL_FILE)
    assert list(locations(tmp_path / MODEL_FILE)) == ["large"]
    assert [value.const_value for value in model.graph.initializers.values()] == before


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """Offsets beyond 2^31 are found by onnx-ir and by ONNX Runtime."""
    rows, columns = 8, 40 << 20
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="large")
    total: ir.Value | None = None
    for index in range(2):
        weight = add_initializer(
            graph, f"w{index}", (rows, columns),
            lambda index=index: np.full((rows, columns), index + 1, np.float32),  # type: ignore[misc]
        )  # fmt: skip
        picked = ir.node("ReduceMax", [weight], attributes={"keepdims": 0})
        graph.append(picked)
        total = picked.outputs[0]
    assert total is not None
    total.name, total.type, total.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.outputs.append(total)
    model = ir.Model(graph, ir_version=10)
    places, files = write_data({"model": model}, tmp_path)
    assert files[DATA_FILE].size_bytes > 2**31
    with externalised({"model": model}, places):
        ir.save(model, tmp_path / MODEL_FILE)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE), full_check=True)
    loaded = ir.load(tmp_path / MODEL_FILE).graph.initializers["w1"].const_value
    assert loaded is not None
    assert loaded.numpy()[-1, -1] == 2
    session = onnxruntime.InferenceSession(
        str(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"]
    )
    assert session.run(None, {})[0] == 2
