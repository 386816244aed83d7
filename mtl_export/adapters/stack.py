"""Several adapters of one base, one per task, as one set of T tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.lazy import LazyLayers
from mtl_export.adapters.normal_form import AdapterSet, AnyAdapter, OwnAdapter, filled_heads
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint, bare_modules, last_modules
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, shortened

Value = TypeVar("Value")


def stacked(
    checkpoint: Checkpoint, members: Sequence[AdapterSet], base: BaseModel | None
) -> AdapterSet:
    """Return one set whose task t is the only task of ``members[t]``.

    Tasks may differ in rank, in the layers they adapt, and in the tensors they replace.

    Raises:
        AdapterError: Only some tasks have a head of their own, and no output of their own.
        BaseModelError: Only some tasks train a layer's bias, and there is no base to take
            the others' from.
    """
    modules = _union([member.layers for member in members])
    heads = _union([member.heads for member in members])
    lacking = [
        f"{task.name} has no head {module!r}"
        for module in heads
        for task, member in zip(checkpoint.tasks, members, strict=True)
        if module not in member.heads and not task.output
    ]
    if lacking:
        raise AdapterError(
            f"{checkpoint.path}: {shortened(lacking)}",
            expected="a head for every task or for none",
            fix="Export the tasks with heads and those without separately",
        )
    names = _union([member.replaced for member in members])
    return AdapterSet(
        family=checkpoint.family,
        tasks=checkpoint.tasks,
        layers=_layers(modules, members, base),
        heads=MappingProxyType(
            {
                name: filled_heads(
                    [member.heads[name][0] if name in member.heads else None for member in members],
                    is_last=name in last_modules(checkpoint.readouts),
                )
                for name in heads
            }
        ),
        model_class=checkpoint.model_class,
        checkpoint_sha256=checkpoint.sha256,
        task_replaced=MappingProxyType(
            {name: tuple(member.replaced.get(name) for member in members) for name in names}
        ),
        rows=MappingProxyType(
            {
                name: tuple(member.own_rows(name, 0) for member in members)
                for name in _union([member.rows for member in members])
            }
        ),
        bare_outputs=bare_modules(checkpoint.readouts),
    )


def _layers(
    modules: Sequence[str], members: Sequence[AdapterSet], base: BaseModel | None
) -> Mapping[str, AnyAdapter]:
    def load(name: str) -> AnyAdapter:
        return _own(name, members, BaseLayer(name, base))

    if any(isinstance(member.layers, LazyLayers) for member in members):
        return LazyLayers.of(modules, load)
    return MappingProxyType({name: load(name) for name in modules})


def _union(mappings: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return every key once, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _own(name: str, members: Sequence[AdapterSet], base: BaseLayer) -> OwnAdapter:
    """Return the layer of T tasks made of T layers of one task each."""
    layers = [member.layers.get(name) for member in members]
    first = next(layer for layer in layers if layer is not None)
    return OwnAdapter(
        module=first.module,
        in_features=first.in_features,
        out_features=first.out_features,
        blocks=tuple(None if layer is None else layer.factors(0) for layer in layers),
        gain=_rows(first, [None if layer is None else layer.gain for layer in layers]),
        bias=_biases(first, members, base),
        transposed=first.transposed,
    )


def _rows(first: AnyAdapter, gains: Sequence[Array | None]) -> Array | None:
    """Return ``[T, O]`` with ones where a task has no gain, or None if none has."""
    if all(gain is None for gain in gains):
        return None
    ones = np.ones(first.out_features)
    return np.stack([ones if gain is None else gain[0] for gain in gains])


def _biases(first: AnyAdapter, members: Sequence[AdapterSet], base: BaseLayer) -> Array | None:
    """Return ``[T, O]``, or None if no adapter sets the bias; the others keep their own."""
    layers = [member.layers.get(first.module) for member in members]
    if all(layer is None or layer.bias is None for layer in layers):
        return None
    biases = [member.replacement(f"{first.module}.bias", 0) for member in members]
    own = base.bias() if any(bias is None for bias in biases) else None
    kept = np.zeros(first.out_features) if own is None else own.astype(np.float64)
    return np.stack([kept if bias is None else bias for bias in biases])
