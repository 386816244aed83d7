"""A graph's external data: which files it names, that they lie beside it, and are whole.

Entries are texts that whoever wrote the graph chose: ``location``, ``offset``, ``length``.
Source: https://github.com/onnx/onnx/blob/v1.21.0/docs/ExternalData.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.checkpoint.contained import contained

if TYPE_CHECKING:
    import onnx


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor: initializers, constants, and those of subgraphs and functions."""
    yield from _of_graph(model.graph)
    pending = [*model.graph.node, *(node for body in model.functions for node in body.node)]
    while pending:
        for attribute in pending.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for graph in graphs:
                yield from _of_graph(graph)
                pending.extend(graph.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def external_files(path: Path, model: onnx.ModelProto) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the files that hold its tensors, sorted, and what is wrong with them.

    Args:
        path: The graph's file.
        model: The graph.

    Raises:
        IntegrityError: One lies outside the graph's folder.
    """
    needed: dict[str, int] = {}
    problems = []
    for tensor in tensors_of(model):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        contained(path.parent, location, where=f"{path}: external data of {tensor.name!r}")
        end = _end(tensor, entry.get("offset", "0"), entry.get("length"))
        if end is None:
            problems.append(f"{tensor.name!r} has another length than its shape, or no place")
        needed[location] = max(needed.get(location, 0), end or 0)
    for name, size in sorted(needed.items()):
        file = path.parent / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size < size:
            problems.append(f"{name} has {file.stat().st_size} bytes of {size}")
    return tuple(sorted(needed)), problems


def _end(tensor: onnx.TensorProto, offset: str, length: str | None) -> int | None:
    """Return where the tensor's bytes end; None if the numbers contradict each other."""
    import onnx_ir as ir

    try:
        bits = ir.DataType(tensor.data_type).bitwidth * prod(tensor.dims)
    except (TypeError, ValueError):  # texts have no width
        return None
    size = -(-bits // 8)
    texts = [offset, str(size) if length is None else length]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
        return None
    begin, count = map(int, texts)
    return None if min(tensor.dims, default=0) < 0 or count != size else begin + count
