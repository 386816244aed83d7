"""Graphs of one structure -> the weights in which they differ.

What refit needs to know before it builds: which matrices its engine must let change, and
that nothing else does. Quantised graphs are refused, because values and scales would have
to change together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtl_export.checkpoint.files.external_files import tensors_of
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineBuildError
from mtl_export.tensorrt.source import load_structure

if TYPE_CHECKING:
    import onnx

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def differing_weights(onnx_paths: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """Return the names, sorted, of the initializers in which graphs of one structure differ.

    Args:
        onnx_paths: The graphs, of any structures.

    Returns:
        For each graph those of its structure; none for a graph alone of its kind.

    Raises:
        EngineBuildError: A graph is quantised, or hides its weights.
    """
    alike: dict[str, list[Path]] = {}
    for path in onnx_paths:
        alike.setdefault(refit_key(path), []).append(path)
    differing: dict[Path, tuple[str, ...]] = {}
    for paths in alike.values():
        names: set[str] = set()
        first = read_weights(paths[0]) if len(paths) > 1 else {}
        for path in paths[1:]:
            names |= changed_weights(first, read_weights(path))
        differing |= dict.fromkeys(paths, tuple(sorted(names)))
    return differing


def changed_weights(first: Mapping[str, Array], other: Mapping[str, Array]) -> set[str]:
    """Return the names whose bytes differ."""
    return {name for name, array in first.items() if not np.array_equal(array, other[name])}


def read_weights(path: Path) -> dict[str, Array]:
    """Return the weights of the graph at ``path`` as bytes, uint8 by name.

    External data is mapped, and not read.

    Raises:
        EngineBuildError: Some weights are not stored as bytes.
    """
    weights = {}
    for tensor in load_structure(path).graph.initializer:
        if _is_weight(tensor):
            array = _stored(path.parent, tensor)
            if array is None:
                raise refused(
                    path,
                    "some of its weights are not stored as bytes",
                    "initializers with raw or external data",
                )
            weights[tensor.name] = array
    return weights


def refit_key(path: Path) -> str:
    """Return the hash of what graphs that differ in weights alone have in common.

    Raises:
        EngineBuildError: It is quantised, or weights are hidden in its structure.
    """
    model = load_structure(path)
    nodes = [*model.graph.node, *(node for body in model.functions for node in body.node)]
    quantised = sorted({node.op_type for node in nodes if node.op_type in _QUANTISED})
    if quantised:
        raise refused(path, f"it is quantised ({', '.join(quantised)})", "a graph without Q/DQ")
    del model.metadata_props[:]
    model.graph.ClearField("name")
    model.graph.ClearField("doc_string")
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            tensor.ClearField("raw_data")
        elif tensor.data_location == tensor.EXTERNAL:
            array = _stored(path.parent, tensor)
            if array is None:
                continue
            tensor.raw_data = array.tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    if any(tensor.data_location == tensor.EXTERNAL for tensor in tensors_of(model)):
        raise refused(
            path,
            "some of its weights are no initializers of the main graph",
            "all of them there, where they have names",
        )
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _stored(folder: Path, tensor: onnx.TensorProto) -> Array | None:
    """Return the tensor's bytes as uint8, None if they are not stored as such."""
    # onnx's own reader refuses hard links, which tasks' folders may share their data by.
    from onnx.external_data_helper import ExternalDataInfo

    if tensor.data_location != tensor.EXTERNAL:
        return np.frombuffer(tensor.raw_data, np.uint8) if tensor.raw_data else None
    info = ExternalDataInfo(tensor)
    if not info.length:
        return None
    return np.memmap(folder / info.location, np.uint8, "r", info.offset or 0, (info.length,))


def _is_weight(tensor: onnx.TensorProto) -> bool:
    # Integers of 32 and 64 bits are shapes and indices: they shape the network.
    return tensor.data_type not in (tensor.INT32, tensor.INT64, tensor.BOOL, tensor.STRING)


def refused(path: Path, found: str, expected: str) -> EngineBuildError:
    """Return the error that says why ``path`` cannot be refitted."""
    return EngineBuildError(
        f"{path}: {found}",
        expected=expected,
        fix="Leave --refit out: each task's engine is then built on its own",
    )
