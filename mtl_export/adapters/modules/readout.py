"""A base with a readout: logits that no transformers class computes, traced like one that does.

    logits = head.k f( ... f( head.0 pool(base(x)) ) )
    where tasks differ in it: NAME = head.NAME.k f( ... ), or the hidden states as they are

The class is the base's own with the chain ``head`` added, so that module names, loading and
tracing are the base's; only its outputs are replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtl_export.checkpoint.checkpoint import Readout
from mtl_export.errors import AdapterError


def with_readouts(
    base_class: Any, readouts: Sequence[Readout], shapes: Mapping[str, tuple[int, ...]]
) -> Any:
    """Return a subclass of a headless transformers class that answers with logits.

    Args:
        base_class: Such as ``BertModel``.
        readouts: What its states go through: one without a name, or several with.
        shapes: Of the weights of the chains' linear layers, ``[O, I]`` each, by module.

    Raises:
        AdapterError: transformers has no function of a name in ``readouts``.
    """
    from transformers.activations import ACT2FN
    from transformers.modeling_outputs import SequenceClassifierOutput

    unknown = sorted({name for one in readouts for name in one.activations} - ACT2FN.keys())
    if unknown:
        raise AdapterError(
            f"head on {base_class.__name__}: function {', '.join(unknown)}",
            expected=f"one of {', '.join(sorted(ACT2FN))}",
            fix="Report the checkpoint's head_config.json",
        )

    class WithReadout(base_class):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            pooled = "add_pooling_layer" in inspect.signature(base_class.__init__).parameters
            pools = any(one.pooling == "pooler" for one in readouts)
            super().__init__(config, **({"add_pooling_layer": pools} if pooled else {}))
            chains: dict[str, nn.Module] = {
                one.name: nn.Identity()
                if one.is_bare
                else nn.ModuleList(_linear(shapes[name]) for name in one.modules)
                for one in readouts
            }
            self.head = chains[""] if "" in chains else nn.ModuleDict(chains)
            self.post_init()

        @functools.wraps(base_class.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            states = super().forward(*args, **kwargs)
            ids = kwargs.get("input_ids")
            read = {one.name: self._read(one, _pooled(states, one, self.config, ids))
                    for one in readouts}  # fmt: skip
            return SequenceClassifierOutput(logits=read[""]) if "" in read else read

        def _read(self, readout: Readout, x: torch.Tensor) -> torch.Tensor:
            chain: Any = self.get_submodule(readout.module)
            if readout.is_bare:
                states: torch.Tensor = chain(x)
                return states
            for layer, name in zip(chain, readout.activations, strict=False):
                x = ACT2FN[name](layer(x))
            logits: torch.Tensor = chain[-1](x)
            return logits

    WithReadout.__name__ = WithReadout.__qualname__ = base_class.__name__
    return WithReadout


def _linear(shape: tuple[int, ...]) -> nn.Linear:
    outputs, inputs = shape
    return nn.Linear(inputs, outputs)


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
