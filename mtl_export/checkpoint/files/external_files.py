"""A graph's tensors: that each is as large as its shape says, and where external data lies.

Entries are texts that whoever wrote the graph chose: ``location``, ``offset``, ``length``.
Source: https://github.com/onnx/onnx/blob/v1.21.0/docs/ExternalData.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_export.checkpoint.files.contained import contained

if TYPE_CHECKING:
    import onnx

_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor: initializers, constants, and those of subgraphs and functions."""
    yield from _of_graph(model.graph)
    pending = [*model.graph.node, *(node for body in model.functions for node in body.node)]
    while pending:
        for attribute in pending.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            one = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for sparse in (*one, *attribute.sparse_tensors):
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
    """Return the names of the files that hold its tensors, sorted, and what is wrong with these.

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
            problems += (
                [] if _is_whole(tensor) else [f"{tensor.name!r} is not as large as its shape"]
            )
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
    size = _size_bytes(tensor)
    texts = [offset, str(size) if length is None else length]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
        return None
    begin, count = map(int, texts)
    return begin + count if count == size else None


def _is_whole(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor in the graph's own file has the values that its shape asks for."""
    size, count = _size_bytes(tensor), int(prod(tensor.dims))
    if tensor.data_type == tensor.STRING:
        return bool(len(tensor.string_data) == count)
    if size is None or tensor.HasField("raw_data"):
        return bool(len(tensor.raw_data) == size)
    # In typed fields small types share an entry, of one byte, and complex numbers take two.
    wanted = {count, 2 * count} if size >= 8 * count else {count, size}
    return sum(len(getattr(tensor, field)) for field in _FIELDS) in wanted


def _size_bytes(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes its values take; None for texts, and for no dtype or shape."""
    import onnx_ir as ir

    try:
        bits = ir.DataType(tensor.data_type).bitwidth * prod(tensor.dims)
    except (TypeError, ValueError):  # texts have no width
        return None
    return None if min(tensor.dims, default=0) < 0 else -(-bits // 8)
