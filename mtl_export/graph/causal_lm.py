"""A causal language model as two graphs: ``prefill`` reads prompts, ``decode`` goes on.

    prefill  input_ids, attention_mask [batch, sequence]
             -> logits [batch, sequence, L], present.<layer>.key|value [batch, H, sequence, E]
    decode   input_ids [batch, 1], attention_mask [batch, past + 1],
             past_key_values.<layer>.key|value [batch, H, past, E]
             -> logits [batch, 1, L], present.<layer>.key|value [batch, H, past + 1, E]

H key-value heads (fewer than the queries' in grouped-query attention), E size of one, L
vocabulary. Positions are counted in the graph from the mask, as transformers' ``generate``
counts them, so padding may be on the left. Every layer keeps all tokens; where the model
attends to a window of them, the mask built in the graph leaves the others out.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import base_model
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.export import ONE_MORE, exported
from mtl_export.graph.marking import mark, unmark
from mtl_export.graph.row_order import note_row_orders
from mtl_export.graph.sampling import sample_pass, vocabulary
from mtl_export.graph.trace import SAMPLE_BATCH, TracedModel, checked_trace, sample_length

PREFILL, DECODE = "prefill", "decode"
MASK_AXES = {0: names.BATCH, 1: names.SEQUENCE}
PAST = "past"
TOTAL = f"{PAST}{ONE_MORE}"

# Kinds of rotary embeddings whose angles depend on the length of the text.
CHANGING = frozenset({"dynamic", "longrope"})

# By layer, then by "key" and "value": [batch, heads, tokens, size].
States = dict[str, dict[str, torch.Tensor]]


def trace_causal_lm(bound: BoundModel, opset: int = names.OPSET) -> tuple[TracedModel, TracedModel]:
    """Return the base of ``bound`` as float32 graphs with markers: prefill, then decode.

    Raises:
        GraphError: The model keeps something else than keys and values of the tokens so far,
            or turns positions otherwise in long texts, the exporter cannot trace it, a marker
            got lost, or tasks change a module of a kind that has no marker.
        BaseModelError: The heads do not fit the model's features.
    """
    model = base_model(bound, torch.float32)
    original = model.forward
    longest = _longest(model)
    ids, mask, cache = samples(model)
    originals = mark(model, bound)
    model.forward = _with_cache(original)
    limits = {names.SEQUENCE: longest, PAST: longest - 1} if longest > 1 else {}
    prompts = {"input_ids": ids, "attention_mask": mask}
    prompt_axes = dict.fromkeys(prompts, MASK_AXES)
    prefill = exported(model, prompts, prompt_axes, limits, defer=True, opset=opset)
    states = {
        f"past_key_values.{layer}.{name}": tensor
        for layer, state in cache.items()
        for name, tensor in state.items()
    }
    more = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    step = {"input_ids": ids[:, -1:], "attention_mask": more, **states}
    axes = {"input_ids": {0: names.BATCH}, "attention_mask": {0: names.BATCH, 1: TOTAL}}
    axes |= {name: {0: names.BATCH, 2: PAST} for name in states}
    decode = exported(model, step, axes, limits, defer=True, opset=opset)
    parts = []
    for stem, part in ((PREFILL, prefill), (DECODE, decode)):
        _name_outputs(part, cache)
        parts.append(checked_trace(part, bound, stem))
    unmark(model, originals)
    for traced, inputs in zip(parts, (prompts, step), strict=True):
        note_row_orders(traced.model, model, originals, inputs)
    return parts[0], parts[1]


def _longest(model: Any) -> int:
    """Return how many positions the model has; 0 if it has no table of them."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 0)


def samples(model: Any) -> tuple[torch.Tensor, torch.Tensor, States]:
    """Return seeded token ids, their mask, and what the model keeps of them.

    Raises:
        GraphError: It keeps something else than keys and values, or turns positions otherwise
            in long texts.
    """
    _refuse_changing_rotation(model)
    longest = _longest(model)
    # The step after the prompt has a position too.
    ids, mask = _sample_prompts(vocabulary(model), sample_length(longest and longest - 1))
    return ids, mask, _sample_cache(model, ids, mask)


def _refuse_changing_rotation(model: Any) -> None:
    """Refuse positions that are turned otherwise once a text is long."""
    rotation = getattr(model.config, "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    of_layers = [one for one in (rotation, *rotation.values()) if isinstance(one, Mapping)]
    found = [str(one["rope_type"]) for one in of_layers if one.get("rope_type") in CHANGING]
    if found:
        raise GraphError(
            f"{type(model).__name__}: rope_type {found[0]} in its config",
            expected=(
                "positions that are turned alike however long the text is, because past some "
                "length keys that are in the cache would have to be turned again, where "
                "transformers reads the whole text anew"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )


def _name_outputs(model: ir.Model, states: States) -> None:
    """Name the outputs; older exporters number them."""
    present = [f"present.{layer}.{kind}" for layer, state in states.items() for kind in state]
    for value, name in zip(model.graph.outputs, ["logits", *present], strict=True):
        value.name = name


def _sample_prompts(vocabulary: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return seeded token ids and their mask, one row padded on the left."""
    shape = (SAMPLE_BATCH, length)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, : length // 3] = 0
    return torch.randint(0, vocabulary, shape, generator=generator), mask


def _sample_cache(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> States:
    """Return keys and values of each layer after these prompts, by layer."""
    states: States = {}
    if "past_key_values" in inspect.signature(model.forward).parameters:
        with sample_pass(model), contextlib.suppress(AttributeError, IndexError, TypeError):
            # Models with another kind of state trip over this one, each in its own way.
            states = _with_cache(model.forward)(ids, mask)["present"]
    length = mask.shape[1]
    odd = [
        layer
        for layer, state in states.items()
        if not all(one is not None and one.shape[2:3] == (length,) for one in state.values())
    ]
    if odd or not states:
        found = f"layers that keep something else: {shortened(odd)}" if odd else "no cache"
        raise GraphError(
            f"{type(model).__name__}: {found}",
            expected=(
                "keys and values [batch, heads, tokens, size] of every token in each layer, "
                "because the decode graph takes exactly these from one step to the next"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )
    return states


def _with_cache(original: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Return the model's forward pass with the cache as tensors, in and out."""
    takes_positions = "position_ids" in inspect.signature(original).parameters

    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: States | None = None,
    ) -> dict[str, Any]:
        from transformers import DynamicCache

        # Told nothing of the model, it keeps all tokens of every layer, sliding or not.
        cache = DynamicCache()
        for layer, state in enumerate((past_key_values or {}).values()):
            cache.update(state["key"], state["value"], layer)
        extra = {}
        if takes_positions:
            counted = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
            extra["position_ids"] = counted[:, -input_ids.shape[1] :]
        output = original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        kept = getattr(output, "past_key_values", None)
        return {"logits": output.logits, "present": _states(getattr(kept, "layers", ()))}

    return forward


def _states(layers: Iterable[Any]) -> States:
    none: Any = None  # a layer that never got any; the samples tell
    return {
        str(index): {name: getattr(layer, f"{name}s", none) for name in ("key", "value")}
        for index, layer in enumerate(layers)
    }
