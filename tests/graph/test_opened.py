from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.errors import GraphError, IntegrityError
from mtl_export.graph.opened import open_graph
from tests.checkpoint.messages import assert_whole

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def written(folder: Path) -> Path:
    """Write a graph of one product with its weight outside."""
    folder.mkdir()
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1,3] x) => (float[1,4] y)'
        " <float[3,4] w> { y = MatMul(x, w) }"
    )
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def changed(path: Path, **entries: str | None) -> None:
    """Set what the graph says of its weight's place."""
    model = onnx.load(path, load_external_data=False)
    (weight,) = model.graph.initializer
    kept = {item.key: item.value for item in weight.external_data} | entries
    del weight.external_data[:]
    for key, value in kept.items():
        if value is not None:
            weight.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def test_a_graph_is_opened_with_its_weights(tmp_path: Path) -> None:
    """Weights beside the graph are found from any working folder, also without a length."""
    path = written(tmp_path / "a")
    for entries in ({}, {"length": None}, {"offset": None}):
        changed(path, **entries)
        weight = open_graph(path).graph.initializers["w"].const_value
        assert isinstance(weight, ir.ExternalTensor)
        np.testing.assert_array_equal(weight.numpy(), WEIGHT)


def _link(path: Path, link: Callable[[Path, Path], object]) -> None:
    data = path.parent / "model.onnx.data"
    target = data.rename(path.parents[1] / "elsewhere.data")
    link(target, data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: changed(path, location="../elsewhere.data"),
        lambda path: changed(path, location="x/../../elsewhere.data"),
        lambda path: changed(path, location=str(path.parents[1] / "elsewhere.data")),
        lambda path: changed(path, location="..\\elsewhere.data"),
        lambda path: changed(path, location=""),
        lambda path: changed(path, location=None),
        lambda path: _link(path, lambda target, data: data.symlink_to(target)),
        lambda path: _link(path, os.link),
    ],
    ids=["parent", "inner parent", "absolute", "backslash", "empty", "none", "link", "hard link"],
)
def test_weights_elsewhere_are_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """A graph may not have any file of the machine read as its weights."""
    path = written(tmp_path / "a")
    (tmp_path / "elsewhere.data").write_bytes(bytes(48))
    harm(path)
    with pytest.raises(IntegrityError) as caught:
        open_graph(path)
    assert_whole(caught.value, where=str(path), found="")


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"offset": "-4"}, "no place"),
        ({"offset": "x"}, "no place"),
        ({"offset": "9" * 30}, "no place"),
        ({"length": "-1"}, "no place"),
        ({"length": "44"}, "another length than its shape"),
        ({"length": "4800"}, "another length than its shape"),
        ({"offset": "4"}, "48 bytes of 52"),
        ({"location": "other.data"}, "other.data is missing"),
    ],
)
def test_weights_cut_off_are_refused(
    tmp_path: Path, entries: dict[str, str | None], found: str
) -> None:
    """Places that the file does not have are a broken graph, before anything is read."""
    path = written(tmp_path / "a")
    changed(path, **entries)
    with pytest.raises(GraphError) as caught:
        open_graph(path)
    assert_whole(caught.value, where=str(path), found=found)


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    """Other bytes, and half a graph, are named as such."""
    path = written(tmp_path / "a")
    for content in (b"hello", path.read_bytes()[:-9], b""):
        path.write_bytes(content)
        with pytest.raises(GraphError) as caught:
            open_graph(path)
        assert_whole(caught.value, where=str(path), found="")
