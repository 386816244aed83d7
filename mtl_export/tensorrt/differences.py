"""Graphs of one structure -> the weights in which they differ, where they lie.

What refit needs to know before it builds: which matrices its engine must let change, and
that nothing else does. Quantised graphs are refused, because values and scales would have
to change together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineBuildError
from mtl_export.tensorrt.source import load_structure
from mtl_export.tensorrt.structure_cache import structure_key, weights_of

if TYPE_CHECKING:
    import onnx

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# name -> its values as bytes, numpy's name of their type, how many
Values: TypeAlias = Mapping[str, tuple[Array, str, int]]


def differing_weights(onnx_paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the initializers in which graphs of one structure differ, sorted.

    Raises:
        EngineBuildError: They differ in more, are quantised, or hide their weights.
    """
    differing: set[str] = set()
    with ExitStack() as open_files:
        first = read_weights(onnx_paths[0], open_files)
        key = refit_key(onnx_paths[0])
        for path in onnx_paths[1:]:
            if refit_key(path) != key:
                raise refused(
                    path,
                    f"it differs from {onnx_paths[0]} in more than weights",
                    "graphs of one structure",
                    "refit changes weights and nothing else",
                )
            with ExitStack() as files_of_one:
                differing |= changed_weights(first, read_weights(path, files_of_one))
    return tuple(sorted(differing))


def changed_weights(first: Values, other: Values) -> set[str]:
    """Return the names whose bytes differ."""
    return {
        name for name, (array, *_) in first.items() if not np.array_equal(array, other[name][0])
    }


def read_weights(path: Path, open_files: ExitStack) -> Values:
    """Return the weights of the graph at ``path``, mapped."""
    model = load_structure(path)
    arrays = weights_of(path, model, open_files)
    if arrays is None:
        raise refused(
            path,
            "some of its weights are not stored as bytes",
            "initializers with raw or external data",
            "refit takes weights from where they lie",
        )
    described = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        name: (array, _dtype_name(described[name]), int(np.prod(described[name].dims)))
        for name, array in arrays.items()
    }


def _dtype_name(tensor: onnx.TensorProto) -> str:
    import onnx

    return str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name)


def refit_key(path: Path) -> str:
    """Return the structure's hash.

    Raises:
        EngineBuildError: It is quantised, or its structure cannot be told from its weights.
    """
    model = load_structure(path)
    nodes = [*model.graph.node, *(node for body in model.functions for node in body.node)]
    quantised = sorted({node.op_type for node in nodes if node.op_type in _QUANTISED})
    if quantised:
        raise refused(
            path,
            f"it is quantised ({', '.join(quantised)})",
            "a graph without Q/DQ",
            "values and scales would have to change together",
        )
    key = structure_key(path, model)
    if key is None:
        raise refused(
            path,
            "some of its weights are no initializers of the main graph",
            "all of them there",
            "only these can be named",
        )
    return key


def refused(path: Path, found: str, expected: str, why: str) -> EngineBuildError:
    """Return the error that says why ``path`` cannot be refitted."""
    return EngineBuildError(
        f"{path}: {found}",
        expected=f"{expected}, because {why}",
        fix="Leave --refit out: each task's engine is then built on its own",
    )
