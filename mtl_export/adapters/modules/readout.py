"""A base with a readout: logits that no transformers class computes, traced like one that does.

    logits = head.k f( ... f( head.0 pool(base(x)) ) )

The class is the base's own with the chain ``head`` added, so that module names, loading and
tracing are the base's; only its outputs are replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtl_export.checkpoint.checkpoint import Readout
from mtl_export.errors import AdapterError


def with_readout(base_class: Any, readout: Readout, shapes: Sequence[tuple[int, ...]]) -> Any:
    """Return a subclass of a headless transformers class that answers with logits.

    Args:
        base_class: Such as ``BertModel``.
        readout: What its states go through.
        shapes: Of the weights of the chain's linear layers, ``[O, I]`` each.

    Raises:
        AdapterError: transformers has no function of a name in ``readout``.
    """
    from transformers.activations import ACT2FN
    from transformers.modeling_outputs import SequenceClassifierOutput

    unknown = sorted(set(readout.activations) - ACT2FN.keys())
    if unknown:
        raise AdapterError(
            where=f"head on {base_class.__name__}",
            found=f"function {', '.join(unknown)}",
            expected=f"one of {', '.join(sorted(ACT2FN))}",
            why="the head is computed with transformers' functions",
            fix="Report the checkpoint's head_config.json",
        )

    class WithReadout(base_class):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            pooled = "add_pooling_layer" in inspect.signature(base_class.__init__).parameters
            settings = {"add_pooling_layer": readout.pooling == "pooler"} if pooled else {}
            super().__init__(config, **settings)
            self.head = nn.ModuleList(nn.Linear(shape[1], shape[0]) for shape in shapes)
            self._functions = [ACT2FN[name] for name in readout.activations]
            self.post_init()

        @functools.wraps(base_class.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            states = super().forward(*args, **kwargs)
            x = _pooled(states, readout, self.config, kwargs.get("input_ids"))
            for layer, function in zip(self.head, self._functions, strict=False):
                x = function(layer(x))
            return SequenceClassifierOutput(logits=self.head[-1](x))

    WithReadout.__name__ = WithReadout.__qualname__ = base_class.__name__
    return WithReadout


def _pooled(
    states: Any, readout: Readout, config: Any, input_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return what the chain is applied to: ``[B, I]``, or ``[B, S, I]`` for all tokens."""
    hidden: torch.Tensor = states[0]
    if readout.pooling == "tokens":
        return hidden
    if readout.pooling == "pooler":
        pooler: torch.Tensor = states.pooler_output
        return pooler
    if readout.pooling == "first":
        return hidden[:, 0]
    if config.pad_token_id is None or input_ids is None:
        return hidden[:, -1]
    # As trained: the number of other tokens tells the last one, so padding is on the right.
    last = (input_ids != config.pad_token_id).sum(-1) - 1
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, last]
