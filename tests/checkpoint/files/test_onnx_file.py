from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mtl_export.checkpoint.files.external_files import external_files
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.errors import EngineRunError, GraphError


def model(weight: onnx.TensorProto) -> onnx.ModelProto:
    """Return a graph of one node with this weight."""
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"], name="add")
    infos = [onnx.helper.make_tensor_value_info(name, 1, [2, 3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:], [weight])
    return onnx.helper.make_model(graph)


def weight(values: np.ndarray | None = None) -> onnx.TensorProto:
    """Return the weight ``w``."""
    return onnx.numpy_helper.from_array(
        np.ones((2, 3), np.float32) if values is None else values, "w"
    )


def folder(path: Path) -> None:
    """Have a folder of that name."""
    path.mkdir()


NOT_READ: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a folder": folder,
    "a pipe that nobody writes to": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "an empty file": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(b"\x93NUMPY"),
    "half a file": lambda path: path.write_bytes(model(weight()).SerializeToString()[:-9]),
    "a name that is no UTF-8": lambda path: path.write_bytes(
        model(weight()).SerializeToString().replace(b"add", b"a\xffd")
    ),
    "a weight's name that is no UTF-8": lambda path: path.write_bytes(
        model(weight()).SerializeToString().replace(b"B\x01w", b"B\x01\xff")
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", NOT_READ)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: str) -> None:
    """By the error that the caller asks for, naming the file, and at once."""
    path = tmp_path / "model.onnx"
    NOT_READ[content](path)
    for error in (GraphError, EngineRunError):
        with pytest.raises(error) as caught:
            read_onnx(path, error=error)
        assert caught.value.problem.startswith(str(path))


@pytest.mark.parametrize(
    "values",
    [
        np.ones((2, 3), np.float32), np.ones((2, 3), np.float16), np.zeros((0, 4)), np.array(True),
        np.ones((2, 2), np.complex64), np.array([["a"], ["b"]], np.object_),
    ],
    ids=lambda values: f"{values.dtype} {values.shape}",
)  # fmt: skip
def test_whole_tensors_pass_in_either_form(tmp_path: Path, values: np.ndarray) -> None:
    """As bytes, and in the field of their type as ``make_tensor`` writes them."""
    raw = onnx.numpy_helper.from_array(values, "w")
    flat: Any = [one.encode() if isinstance(one, str) else one for one in values.ravel().tolist()]
    typed = onnx.helper.make_tensor("w", raw.data_type, values.shape, flat)
    for tensor in (raw, typed):
        assert external_files(tmp_path / "model.onnx", model(tensor)) == ((), [])


def changed(**fields: object) -> onnx.TensorProto:
    """Return the weight with fields changed."""
    tensor = weight()
    for name, value in fields.items():
        tensor.ClearField(name)
        if isinstance(value, list):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        changed(raw_data=b"1234"), changed(dims=[2, 4]), changed(dims=[2, -3]),
        changed(dims=[2**62, 2**62]),
        changed(data_type=0), changed(data_type=99), changed(data_type=11),
        onnx.TensorProto(name="w", data_type=1, dims=[2, 3], float_data=[1.0]),
        onnx.TensorProto(name="w", data_type=8, dims=[2], string_data=[b"a"]),
    ],
)  # fmt: skip
def test_tensors_that_are_not_as_large_as_their_shape_are_named(
    tmp_path: Path, tensor: onnx.TensorProto
) -> None:
    """Before a value is read, by which time nobody can say whose it was."""
    names, problems = external_files(tmp_path / "model.onnx", model(tensor))
    assert names == ()
    assert problems == ["'w' is not as large as its shape"]
