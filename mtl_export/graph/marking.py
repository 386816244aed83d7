"""Swap every module whose tensors differ between tasks for one that leaves a marker.

    mtl_export::TaskLinear(x, weight, bias?)   an adapted linear layer, or one whose bias
                                               tasks trained themselves
    mtl_export::TaskHead(x)                    a linear layer of which every task has its own
    mtl_export::TaskEmbedding(ids)             an embedding, adapted or replaced in part or whole
    mtl_export::TaskNorm(x, weight, bias)      a LayerNorm
    mtl_export::TaskOutput(x)                  x itself, which is the answer of some tasks only

Every marker has the attribute ``module``, the dotted name; TaskNorm has ``epsilon``. x
``[B, ..., I]``, ids ``[B, S]`` or ``[1, S]``, weight ``[O, I]`` (``[I]`` for a norm), bias
``[O]``. Where x or ids come in other rows than the batch's, the attribute ``rows`` says in
which (``row_order``). The markers have no meaning to any runtime; ``lower`` replaces every one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.model import layer_named, linear_named
from mtl_export.adapters.modules.naming import own_module
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.errors import BaseModelError, GraphError, shortened
from mtl_export.graph import names


class _LinearMarker(nn.Module):
    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.weight, self.bias, self._name = layer.weight, layer.bias, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        shape = (*x.shape[:-1], self.weight.shape[0])
        return _marker(names.MARKER_LINEAR, (x, *parameters), self._name, x.dtype, shape)


class _HeadMarker(nn.Module):
    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self._width, self._name = width, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self._width)
        return _marker(names.MARKER_HEAD, (x,), self._name, x.dtype, shape)


class _EmbeddingMarker(nn.Module):
    def __init__(self, layer: nn.Embedding, name: str) -> None:
        super().__init__()
        # Some models ask their embedding for its weight's dtype or device.
        self.weight, self._name = layer.weight, name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        shape = (*ids.shape, self.weight.shape[1])
        return _marker(names.MARKER_EMBEDDING, (ids,), self._name, self.weight.dtype, shape)


class _NormMarker(nn.Module):
    def __init__(self, layer: nn.LayerNorm, name: str) -> None:
        super().__init__()
        self.weight, self.bias, self._name = layer.weight, layer.bias, name
        self._epsilon = layer.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (x, self.weight, self.bias)
        return _marker(
            names.MARKER_NORM, inputs, self._name, x.dtype, tuple(x.shape), epsilon=self._epsilon
        )


class _OutputMarker(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _marker(names.MARKER_OUTPUT, (x,), self._name, x.dtype, tuple(x.shape))


def _marker(
    op_type: str,
    inputs: tuple[torch.Tensor, ...],
    module: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    **attributes: float,
) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{names.DOMAIN}::{op_type}",
        inputs,
        {names.MODULE_ATTRIBUTE: module, **attributes},
        dtype=dtype,
        shape=shape,
        version=names.DOMAIN_VERSION,
    )


def marked_modules(adapters: AdapterSet) -> tuple[str, ...]:
    """Return the names of all modules that get a marker."""
    own = [name.rpartition(".")[0] for name in adapters.own_tensors]
    found = [*adapters.layers, *adapters.heads, *own, *adapters.bare_outputs]
    return tuple(dict.fromkeys(found))


def mark(model: Any, bound: BoundModel) -> dict[str, nn.Module]:
    """Swap the modules of ``model`` that differ between tasks.

    Returns:
        The modules that were swapped, by the names their markers carry; ``unmark`` takes them.

    Raises:
        GraphError: A module is of a kind that no marker stands for.
        BaseModelError: The heads do not fit the model's features, or an adapter or a head is
            for a module that the model does not have, or that is not linear.
    """
    adapters = bound.adapters
    originals = {}
    for module in marked_modules(adapters):
        if module in adapters.heads:
            _refuse_misfit(bound, linear_named(model, module), module)
            width = max(head.weight.shape[0] for head in adapters.heads[module])
            marker: nn.Module = _HeadMarker(width, module)
        elif module in adapters.layers:
            layer = layer_named(model, module)
            marker = (
                _embedding_marker(model, layer, module)
                if isinstance(layer, nn.Embedding)
                else _LinearMarker(layer, module)
            )
        elif module in adapters.bare_outputs:
            marker = _OutputMarker(module)
        else:
            marker = _own_marker(model, module, adapters)
        own = own_module(model, module)
        originals[module] = model.get_submodule(own)
        model.set_submodule(own, marker)
    return originals


def unmark(model: Any, originals: Mapping[str, nn.Module]) -> None:
    """Undo ``mark``."""
    for module, original in originals.items():
        model.set_submodule(own_module(model, module), original)


def _own_marker(model: Any, module: str, adapters: AdapterSet) -> nn.Module:
    """Return the marker for a module that no adapter touches but whose tensors tasks replace."""
    layer = model.get_submodule(own_module(model, module))
    own = {name for name in adapters.own_tensors if name.rpartition(".")[0] == module}
    known = {f"{module}.weight", f"{module}.bias"}
    if type(layer) is nn.LayerNorm and own <= known and layer.elementwise_affine:
        return _NormMarker(layer, module)
    if type(layer) is nn.Embedding and own <= known:
        return _embedding_marker(model, layer, module)
    if own <= known and _is_linear(layer):
        linear = linear_named(model, module)
        if f"{module}.weight" in own:
            return _HeadMarker(linear.out_features, module)
        return _LinearMarker(linear, module)
    raise GraphError(
        f"{module}: tasks have their own {shortened(sorted(own))} of a {type(layer).__name__}",
        expected=(
            "a linear layer, an embedding or a LayerNorm, because the graph must pick each row's "
            "own"
        ),
        fix="Merge per task instead (mtl-export merge)",
    )


def _is_linear(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, nn.Linear | Conv1D)


def _embedding_marker(model: Any, layer: nn.Embedding, module: str) -> _EmbeddingMarker:
    """Return the marker of an embedding whose weight is its own.

    Raises:
        GraphError: Another module uses the same weight: it would keep the base's.
    """
    users = [
        name
        for name, other in model.named_modules()
        if other is not layer and any(p is layer.weight for p in other.parameters(recurse=False))
    ]
    if users:
        raise GraphError(
            f"{module}: its weight is also that of {shortened(users)}",
            expected=(
                "an embedding with a weight of its own, because tasks change it, and the other "
                "layer would need every task's too"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )
    return _EmbeddingMarker(layer, module)


def _refuse_misfit(bound: BoundModel, layer: nn.Linear, module: str) -> None:
    """Refuse heads that take another number of features than the model gives them."""
    taken = {head.weight.shape[1] for head in bound.adapters.heads[module]}
    if taken != {layer.in_features}:
        raise BaseModelError(
            f"head {module}: the checkpoint's heads take {shortened(map(str, sorted(taken)))} "
            "features",
            expected=(
                f"{layer.in_features} features, because {bound.adapters.model_class} on base "
                f"{bound.base.reference} gives as many"
            ),
            fix="Pass the base the adapter was trained on to --base",
        )
