"""What tensors of the base a checkpoint replaced for all tasks, as a routed graph says it.

    mtl_export.replaced    {name in the model class: first 16 hex digits of a SHA-256}

The graph holds such a tensor once (a pooler, a norm, an embedding), where another checkpoint
on the same base may have the base's own, or its own: nothing else in the file tells which.
The digest is of the shape and of the values in float32, whatever the graph computes in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.files.json_file import parse_json
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.graph.stacks_on_disk import as_stored

METADATA = "mtl_export.replaced"
DIGITS = 16
# Where a stack holds what tasks have in place of such a tensor, a task brings its own.
_STACKED = {"weight": ("weights", "table"), "bias": ("biases",)}


def replaced_json(adapters: AdapterSet) -> str:
    """Return the digest of every tensor that ``adapters`` replace for all tasks, as JSON."""
    return json.dumps(
        {name: _digest(adapters.replaced[name]) for name in sorted(adapters.replaced)}
    )


def is_stacked(name: str, places: Collection[tuple[str, str]]) -> bool:
    """Return whether tensor ``name`` of the base is one that a graph has for each task.

    Args:
        name: In the model class.
        places: Module and part of every stack of the graph.
    """
    module, _, kind = name.rpartition(".")
    return any((module, part) in places for part in _STACKED.get(kind, ()))


def replaced_otherwise(
    adapters: AdapterSet, models: Mapping[str, ir.Model], places: Collection[tuple[str, str]]
) -> Iterator[str]:
    """Yield what ``adapters`` share between tasks otherwise than the tasks of the graphs.

    A graph written before there was ``METADATA`` does not say what its tasks replaced: of it
    only what ``adapters`` replace can be told.

    Args:
        adapters: A checkpoint.
        models: The graphs of one folder.
        places: Module and part of every stack in them.
    """
    metadata = next(iter(models.values())).metadata_props
    fix = "Export the graph again"
    known: dict[str, str] = parse_json(metadata.get(METADATA, "{}"), METADATA, {str: str}, fix=fix)
    for name in sorted({*known, *adapters.replaced}):
        values = adapters.replaced.get(name)
        if is_stacked(name, places):
            continue
        if values is None:
            yield f"{name} of the base, which the graph's tasks trained"
        elif name in known:
            if _digest(values) != known[name]:
                yield f"{name} with other values"
        else:
            yield from _unlike_graph(name, values, models)


def is_same(stored: ir.TensorProtocol, values: Array) -> bool:
    """Return whether a graph's tensor holds ``values`` in its dtype."""
    return np.array_equal(stored.numpy(), as_stored(values, stored.dtype))


def _unlike_graph(name: str, values: Array, models: Mapping[str, ir.Model]) -> Iterator[str]:
    keys = (name, names.weight_t(name.removesuffix(".weight")))
    found = [
        value.const_value
        for model in models.values()
        for key in keys
        if (value := model.graph.initializers.get(key)) and value.const_value is not None
    ]
    if not found:
        yield f"its own {name}, which the graph's tasks share"
    elif not all(is_same(t, values) or is_same(t, values.T) for t in found):
        yield f"{name} with other values"


def _digest(values: Array) -> str:
    content = np.ascontiguousarray(values, np.dtype("<f4"))
    shape = "x".join(map(str, values.shape))
    return hashlib.sha256(f"{shape}:".encode() + content.tobytes()).hexdigest()[:DIGITS]
