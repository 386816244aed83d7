"""An ONNX file -> what a builder must know about it, without reading a weight.

Inputs, outputs, the ``mtl_export.*`` metadata and the external data files. Files are
checked here because the parser's own words for a missing or short one are
"Failed to open file" at best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint.files.external_files import external_files
from mtl_export.checkpoint.files.json_file import Shape, parse_json
from mtl_export.checkpoint.files.onnx_file import read_onnx
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import EngineBuildError, shortened
from mtl_export.tensorrt.api import TrtObject

if TYPE_CHECKING:
    import onnx

PREFIX = "mtl_export."
# TensorRT's DataType -> numpy's (or ml_dtypes') name
NUMPY_NAMES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "E8M0": "float8_e8m0fnu",
    "FLOAT": "float32",
    "FP4": "float4_e2m1fn",
    "FP8": "float8_e4m3fn",
    "HALF": "float16",
    "INT32": "int32",
    "INT4": "int4",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output.

    Attributes:
        name: Its name.
        dtype: numpy's name of its element type, such as ``int64``.
        shape: Sizes; a str names a dynamic dimension, "" one without a name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def is_dynamic(self) -> bool:
        """Return whether any of its dimensions is dynamic."""
        return any(isinstance(size, str) for size in self.shape)

    def admits(self, shape: Sequence[int]) -> bool:
        """Return whether ``shape`` has its rank and its fixed sizes."""
        return len(shape) == len(self.shape) and all(
            isinstance(fixed, str) or fixed == size
            for fixed, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        """Return it as a declaration, such as ``int64 task_ids[batch]``."""
        return f"{self.dtype} {self.name}[{', '.join(str(size) or '?' for size in self.shape)}]"


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file, its weights unread.

    Attributes:
        path: The file.
        inputs: What the caller gives, in order.
        outputs: What it gives back, in order.
        metadata: Its ``metadata_props``.
        external_files: Names of its external data files, relative to its folder, sorted.
    """

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    external_files: tuple[str, ...]

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of the file and of its external data, by name."""
        names = (self.path.name, *self.external_files)
        return {name: sha256_of_file(self.path.parent / name) for name in names}

    def structured(self, key: str, shape: Shape) -> Any:
        """Return the JSON value of metadata ``mtl_export.<key>``, or None if there is none.

        Raises:
            EngineBuildError: The value is no JSON of this shape.
        """
        text = self.metadata.get(PREFIX + key)
        if text is None:
            return None
        where = f"{self.path}: metadata {PREFIX}{key}"
        return parse_json(text, where, shape, error=EngineBuildError, fix="Export the graph again")


def read_source(path: Path) -> OnnxSource:
    """Return the description of the ONNX file at ``path``.

    Raises:
        EngineBuildError: It is missing, truncated, no ONNX, or lacks external data.
        IntegrityError: It asks for a file outside its own folder.
    """
    model = load_structure(path)
    initializers = {tensor.name for tensor in model.graph.initializer}
    return OnnxSource(
        path=path,
        inputs=tuple(
            _tensor_info(value) for value in model.graph.input if value.name not in initializers
        ),
        outputs=tuple(_tensor_info(value) for value in model.graph.output),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        external_files=_external_files(path, model),
    )


def load_structure(path: Path) -> onnx.ModelProto:
    """Return the ONNX file at ``path`` without its external data.

    Raises:
        EngineBuildError: It is missing, truncated or no ONNX.
    """
    return read_onnx(path, error=EngineBuildError)


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    import onnx

    tensor_type = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).name)
    except (KeyError, ValueError):
        dtype = "unknown"
    return TensorInfo(
        name=value.name,
        dtype=dtype,
        shape=tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param
            for dim in tensor_type.shape.dim
        ),
    )


def _external_files(path: Path, model: onnx.ModelProto) -> tuple[str, ...]:
    names, problems = external_files(path, model)
    if problems:
        raise EngineBuildError(
            f"{path}: external data: {shortened(problems)}",
            expected="the weight files next to the graph, whole",
            fix=f"Copy {path.parent} as one folder, or write it again",
        )
    return names


def numpy_name(data_type: TrtObject) -> str:
    """Return numpy's name of a TensorRT element type."""
    name = str(data_type.name)
    return NUMPY_NAMES.get(name, name.lower())
