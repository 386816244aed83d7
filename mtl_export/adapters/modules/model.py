"""A transformers model with its linear layers adapted and its heads multiplied per task.

The same class is what a trainer optimises and what parity uses as the oracle: the
unmerged model, one paper's forward pass per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mtl_export.adapters.modules.naming import own_module
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import NO_LABEL
from mtl_export.errors import BaseModelError


class TaskHeads(nn.Module):
    """One linear head per task, chosen per row.

    Args:
        heads: One ``nn.Linear`` per task, in id order; label counts may differ. None for a task
            whose answer is another output.
        routing: Says which task each row belongs to.

    Shape:
        x ``[B, I]`` or ``[B, S, I]``; result ``[B, L]`` or ``[B, S, L]`` with L the widest
        head. Columns a task does not have are -inf.
    """

    def __init__(self, heads: Sequence[nn.Linear | None], routing: TaskRouting) -> None:
        super().__init__()
        # A chain without layers takes no row: it stands where a task has no head.
        self.heads = nn.ModuleList(nn.Sequential() if head is None else head for head in heads)
        self.routing = routing
        self.label_counts = [0 if head is None else head.out_features for head in heads]
        self.width = max(self.label_counts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of every row's own head."""
        task_ids = self.routing.rows(x.shape[0])
        logits = x.new_full((*x.shape[:-1], self.width), NO_LABEL)
        for index, (head, labels) in enumerate(zip(self.heads, self.label_counts, strict=True)):
            rows = (task_ids == index).nonzero().squeeze(-1)
            if rows.numel() and labels:
                own = functional.pad(head(x[rows]), (0, self.width - labels), value=NO_LABEL)
                logits = logits.index_copy(0, rows, own)
        return logits


class MultiTaskModel(nn.Module):
    """A model whose rows each pick their own task.

    Args:
        model: A transformers model; its parameters are frozen and its layers replaced.
        adapters: By dotted module name, a function from the base layer and the routing
            to the adapted layer.
        heads: By dotted module name, one linear head per task, as ``TaskHeads`` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapters: Mapping[str, Callable[[Any, TaskRouting], nn.Module]],
        heads: Mapping[str, Sequence[nn.Linear | None]],
    ) -> None:
        super().__init__()
        self.routing = TaskRouting()
        self.model = model.requires_grad_(False)
        for name, adapt in adapters.items():
            adapted = adapt(layer_named(model, name), self.routing)
            model.set_submodule(own_module(model, name), adapted)
        for name, task_heads in heads.items():
            linear_named(model, name)
            model.set_submodule(own_module(model, name), TaskHeads(task_heads, self.routing))
        self.adapter_modules = tuple(adapters)
        self.head_modules = tuple(heads)

    def forward(self, *, task_ids: torch.Tensor, **inputs: Any) -> Any:
        """Return the transformers output for ``inputs``, row b under ``task_ids[b]``."""
        self.routing.set(task_ids)
        return self.model(**inputs)


def layer_named(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    """Return the linear layer or the embedding called ``name``.

    Raises:
        BaseModelError: There is none, it is neither, or an embedding that does more than
            look up.
    """
    layer = model.get_submodule(own_module(model, name))
    return layer if type(layer) is nn.Embedding else linear_named(model, name)


def linear_named(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer called ``name``; a transformers ``Conv1D`` as one.

    Raises:
        BaseModelError: There is none, or it is no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    layer = model.get_submodule(own_module(model, name))
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta", dtype=layer.weight.dtype)
        linear.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
        linear.bias = layer.bias
        return linear
    if not isinstance(layer, nn.Linear):
        raise BaseModelError(
            f"{name}: a {type(layer).__name__} in {type(model).__name__}",
            expected="an nn.Linear, or transformers' Conv1D",
            fix="Name the linear layers inside it as target or head modules",
        )
    return layer
