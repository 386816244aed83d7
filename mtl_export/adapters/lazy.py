"""Adapted layers that are computed when asked for, so that memory does not grow with depth.

A checkpoint of a deep model holds hundreds of megabytes of factors; a merge needs one
layer's at a time. What can be told without their values (shapes, which tasks a layer
serves, cores, gains, biases) is kept as an outline of each layer.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from mtl_export.adapters.normal_form import AnyAdapter, Factors, LayerAdapter
from mtl_export.checkpoint.tensors import Array

# Below this size of a checkpoint's layers, all are simply kept.
LAZY_BYTES = 8 << 20
# Neighbouring layers are used together: while the last rows of one are folded, the next begins.
KEPT = 3


class LazyLayers(Mapping[str, AnyAdapter]):
    """Layers by module; indexing computes one, and the last few are kept.

    Args:
        outlines: The layers with ``down`` and ``up`` of the right shape and no values.
        load: Computes one.

    Attributes:
        outlines: As given.
    """

    def __init__(
        self, outlines: Mapping[str, AnyAdapter], load: Callable[[str], AnyAdapter]
    ) -> None:
        self.outlines = MappingProxyType(dict(outlines))
        self._load = load
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, AnyAdapter] = OrderedDict()

    @classmethod
    def of(cls, modules: Iterable[str], load: Callable[[str], AnyAdapter]) -> LazyLayers:
        """Return the layers called ``modules``; each is computed once now, for its outline."""
        return cls({module: outline(load(module)) for module in modules}, load)

    def __getitem__(self, module: str) -> AnyAdapter:
        """Return the layer called ``module``."""
        if module not in self.outlines:
            raise KeyError(module)
        with self._lock:
            if module not in self._kept:
                self._kept[module] = self._load(module)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return self._kept[module]

    def __iter__(self) -> Iterator[str]:
        """Yield the modules in order."""
        return iter(self.outlines)

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.outlines)

    def __contains__(self, module: object) -> bool:
        """Return whether there is such a layer, without computing it."""
        return module in self.outlines


def outline(layer: AnyAdapter) -> AnyAdapter:
    """Return ``layer`` with factors of the right shape that take no memory."""
    if isinstance(layer, LayerAdapter):
        return dataclasses.replace(layer, down=_hollow(layer.down), up=_hollow(layer.up))
    blocks = tuple(
        None if block is None else Factors(_hollow(block.down), block.core, _hollow(block.up))
        for block in layer.blocks
    )
    return dataclasses.replace(layer, blocks=blocks)


def mapped(
    layers: Mapping[str, AnyAdapter], change: Callable[[AnyAdapter], AnyAdapter]
) -> Mapping[str, AnyAdapter]:
    """Return ``layers`` with ``change`` made to each, as lazily as they are.

    Args:
        layers: By module.
        change: Changes anything but ``down`` and ``up``.
    """
    if isinstance(layers, LazyLayers):
        changed = {module: change(layer) for module, layer in layers.outlines.items()}
        return LazyLayers(changed, lambda module: change(layers[module]))
    return MappingProxyType({module: change(layer) for module, layer in layers.items()})


def _hollow(values: Array) -> Array:
    return np.broadcast_to(np.zeros((), values.dtype), values.shape)
