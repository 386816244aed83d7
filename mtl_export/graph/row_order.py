"""Which rows of the batch the rows of a layer's input belong to, found by trying.

    batch       [batch, ...]        row b belongs to row b of the batch
    repeated    [batch * k, ...]    rows b k ... b k + k - 1 do: windows, beams, packed tokens
    tiled       [k * batch, ...]    rows b, b + batch, ... do: as ``x.repeat(k, 1)`` makes them
    second      [k, batch, ...]     x[:, b] does: sequence first

The traced sizes say how many rows there are; they cannot say in which order. So one row of
a batch is changed at a time, and what changes at a layer tells which of its rows that is.
Batches of two sizes must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from mtl_export.checkpoint.tensors import Array
from mtl_export.graph import names
from mtl_export.graph.export import nested
from mtl_export.graph.passes.markers import (
    input_of,
    is_batch_first,
    layer_of,
    markers,
    module_of,
    rank,
    use_of,
)

RowOrder = Literal["batch", "repeated", "tiled", "second"]
# Rows count as changed beyond this part of the largest value: products of equal numbers may
# differ in their last bit where other rows of the same product do not.
CHANGED = 1e-5
# Sizes of the batches tried; both differ from every factor a window or a beam is likely to have.
BATCHES = (3, 2)


def note_row_orders(
    graph: ir.Model,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    """Write on each marker whose rows are not simply the batch's in what order they are.

    A marker whose order cannot be told, or whose traced size does not follow the batch, gets
    no attribute; the passes that route rows refuse it.

    Args:
        graph: With markers.
        model: The unmarked model, called as it was traced.
        modules: Its modules that the markers stand for, by the markers' names.
        inputs: Sample inputs of at least ``max(BATCHES)`` rows, named as the graph's.
    """
    unclear = [
        node
        for node in markers(graph)
        if not is_batch_first(input_of(node)) and not _is_shared(input_of(node))
    ]
    if not unclear:
        return
    uses = {module_of(node): use_of(node)[1] for node in unclear}
    orders = probed_orders(model, {name: modules[name] for name in uses}, inputs, uses)
    for node in unclear:
        order = orders[layer_of(node)]
        if order is not None and _follows_batch(input_of(node), order):
            node.attributes[names.ROWS_ATTRIBUTE] = ir.AttrString(names.ROWS_ATTRIBUTE, order)


def _is_shared(x: ir.Value) -> bool:
    """Return whether all rows of the batch have one input, as positions are."""
    return rank(x) > 0 and x.shape is not None and x.shape[0] == 1


def probed_orders(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
    uses: Mapping[str, int] | None = None,
) -> dict[str, RowOrder | None]:
    """Return the order of the rows that each module takes, None where it cannot be told.

    Args:
        model: The model.
        modules: Its modules, by name.
        inputs: Sample inputs.
        uses: How often each module is used, once where it is left out; each use has an order,
            by ``names.used``.
    """
    layers = {name: (uses or {}).get(name, 1) for name in modules}
    every = [names.used(name, one + 1) for name, count in layers.items() for one in range(count)]
    found: list[dict[str, RowOrder | None]] = []
    for batch in BATCHES:
        rows = {name: value[:batch] for name, value in inputs.items()}
        before = _taken(model, modules, rows, layers)
        after = [_taken(model, modules, _changed(rows, row), layers) for row in range(batch)]
        found.append(
            {
                name: _order([_differences(before.get(name), one.get(name)) for one in after])
                for name in every
            }
        )
    first, second = found
    return {name: order if order == second[name] else None for name, order in first.items()}


def _taken(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    inputs: Mapping[str, torch.Tensor],
    uses: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Return what each use of a module is given; one that is called another time is left out."""
    taken: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Any:
        def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(named.values()))
            taken[name].append(x.detach().clone())

        return note

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
        model(**nested(inputs))
    return {
        names.used(name, number): x
        for name, calls in taken.items()
        if len(calls) == uses[name]
        for number, x in enumerate(calls, start=1)
    }


def _changed(inputs: Mapping[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """Return the inputs with other contents in one row, and the same tokens masked."""
    generator = torch.Generator().manual_seed(row + 1)
    changed = {}
    for name, value in inputs.items():
        values = value.clone()
        if value.is_floating_point():
            values[row] = torch.randn(value[row].shape, generator=generator)
        elif name.endswith("input_ids"):
            # The sample's own ids, shifted: inside the vocabulary, and none stays in its place.
            largest = int(value.max()) + 1
            values[row] = (value[row] + 1) % largest
        changed[name] = values
    return changed


def _differences(before: torch.Tensor | None, after: torch.Tensor | None) -> Array | None:
    """Return where two tensors differ, None if that cannot be told."""
    if before is None or after is None or before.shape != after.shape:
        return None
    first, second = (value.to(torch.float64).numpy() for value in (before, after))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    differs: Array = np.abs(second - first) > CHANGED * max(np.abs(first).max(initial=0.0), 1e-30)
    return differs


def _order(differences: list[Array | None]) -> RowOrder | None:
    """Return the order that explains what changed with each row of the batch."""
    if any(one is None for one in differences):
        return None
    changed = np.stack([one for one in differences if one is not None])  # [batch, *shape]
    batch, shape = len(changed), changed.shape[1:]
    views: dict[RowOrder, tuple[tuple[int, ...], int]] = {"batch": (shape, 0)}
    if shape[0] > batch and shape[0] % batch == 0:
        views["repeated"] = ((batch, prod(shape) // batch), 0)
        views["tiled"] = ((shape[0] // batch, batch, prod(shape[1:])), 1)
    if len(shape) > 1:
        views["second"] = (shape, 1)
    for order, (view, axis) in views.items():
        if view[axis] != batch:
            continue
        others = tuple(1 + number for number in range(len(view)) if number != axis)
        # Row b changes all of its own rows' part and nothing else.
        touched = changed.reshape(batch, *view).any(axis=others)
        if np.array_equal(touched, np.eye(batch, dtype=bool)):
            return order
    return None


def _follows_batch(x: ir.Value, order: RowOrder) -> bool:
    """Return whether the traced size of the dimension with the rows grows with the batch."""
    axis = 1 if order == "second" else 0
    dim = x.shape[axis] if x.shape is not None and len(x.shape) > axis else None
    if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
        return False
    if order in {"batch", "second"}:
        return str(dim.value) == names.BATCH
    return re.search(rf"\b{names.BATCH}\b", str(dim.value)) is not None
