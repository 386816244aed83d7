"""Trace an encoder-decoder as the three graphs that generation runs.

    encoder            input_ids, attention_mask [B, S], what else the encoder reads
                       -> last_hidden_state [B, S, d]
    decoder            decoder_input_ids [B, D], encoder_hidden_states [B, S, d],
                       encoder_attention_mask [B, S]
                       -> logits [B, D, L], present.<layer>.decoder|encoder.key|value
    decoder_with_past  decoder_input_ids [B, 1], encoder_attention_mask [B, S],
                       past_key_values.<layer>.decoder|encoder.key|value
                       -> logits [B, 1, L], present.<layer>.decoder.key|value

B rows, S what the encoder gives, D tokens of the decoder, L vocabulary; keys and values are
[B, heads, tokens, size]. The encoder's keys and values never change after the first step, so
``decoder_with_past`` reads them and does not give them back; the layers that make them are not
in it. An encoder that reads more than text also gives ``encoder_attention_mask``, because its
states are more than the tokens.

All three are traced from one marked model, so a layer has the same markers and initializer
names in each. Embeddings that are tied are one initializer, under the name the base stores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import base_model
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.export import Axes, exported
from mtl_export.graph.marking import mark, marked_modules, unmark
from mtl_export.graph.passes.markers import markers, module_of, number_uses
from mtl_export.graph.row_order import note_row_orders
from mtl_export.graph.sampling import sample_pass, vocabulary
from mtl_export.graph.trace import SAMPLE_BATCH, TracedModel, sample_length

ENCODER, DECODER, WITH_PAST = "encoder", "decoder", "decoder_with_past"
STEMS = (ENCODER, DECODER, WITH_PAST)
# Unlike any other sample size, so that none is mistaken for another.
SAMPLE_TOKENS = 5
DECODER_SEQUENCE, PAST = "decoder_sequence", "past"
_SOURCE: Axes = {
    "encoder_hidden_states": {0: names.BATCH, 1: names.SEQUENCE},
    "encoder_attention_mask": {0: names.BATCH, 1: names.SEQUENCE},
}


@dataclass(frozen=True)
class _Part:
    """One graph to trace.

    Attributes:
        stem: Its name.
        forward: Called with the inputs; returns the outputs by name.
        inputs: Samples.
        axes: Which of their sizes may vary.
    """

    stem: str
    forward: Callable[..., dict[str, torch.Tensor]]
    inputs: Mapping[str, torch.Tensor]
    axes: Axes


def trace_seq2seq(bound: BoundModel, opset: int = names.OPSET) -> tuple[TracedModel, ...]:
    """Return ``encoder``, ``decoder`` and ``decoder_with_past`` as float32 graphs with markers.

    Raises:
        GraphError: The encoder reads no text, the decoder keeps another kind of cache, the
            exporter cannot trace the model, or a marker got lost.
        BaseModelError: The heads do not fit the model's features.
    """
    model = base_model(bound, torch.float32)
    refuse_other_inputs(model)
    model.config.use_cache = True
    originals = mark(model, bound)
    longest = _longest(model)
    limits = {DECODER_SEQUENCE: longest, PAST: longest - 1} if longest else {}
    graphs: dict[str, ir.Model] = {}
    parts = sample_parts(model, bound)
    for part in parts:
        # A position table bounds the text; an encoder's states may be more than its tokens.
        own = {names.SEQUENCE: longest} if longest and part.stem == ENCODER else {}
        with _forward(model, part.forward):
            graph = exported(model, part.inputs, part.axes, limits | own, opset=opset)
        _name_tied(graph, model, bound)
        graphs[part.stem] = graph
    traced = checked_parts(graphs, bound)
    unmark(model, originals)
    for one, part in zip(traced, parts, strict=True):
        with _forward(model, part.forward):
            note_row_orders(one.model, model, originals, part.inputs)
    return traced


def refuse_other_inputs(model: Any) -> None:
    """Refuse an encoder that reads no text, or reads long texts otherwise than short ones."""
    if model.main_input_name != "input_ids":
        raise GraphError(
            f"model class {type(model).__name__}: an encoder that reads {model.main_input_name}",
            expected=(
                "an encoder that reads input_ids, as those of T5 and BART do, because "
                "encoder-decoders are exported for text"
            ),
            fix="Merge its tasks instead: mtl-export merge",
        )
    if getattr(model.config, "attention_type", "") == "block_sparse":
        raise GraphError(
            f"model class {type(model).__name__}: attention_type block_sparse in its config",
            expected=(
                "attention that is computed alike for texts of every length, because it is full "
                "for short texts and sparse, at random, for long ones"
            ),
            fix="Merge its tasks instead: mtl-export merge",
        )


def _longest(model: Any) -> int:
    """Return how many positions the model has; 0 if it has no table of them."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 0)


def sample_parts(model: Any, bound: BoundModel) -> list[_Part]:
    """Return the three parts; each one's samples are what the one before gives."""
    text, axes = _encoder_inputs(model, bound)
    encode = getattr(model, "encoded", None) or _encode(model)
    decode, step = _decode(model), _step(model)
    with sample_pass(model):
        encoded = encode(**text)
        mask = encoded.get("encoder_attention_mask", text["attention_mask"])
        # The step after these tokens has a position too.
        most = _longest(model) - 1
        tokens = _ids(model, min(SAMPLE_TOKENS, most) if most > 0 else SAMPLE_TOKENS, seed=1)
        source = {
            "encoder_hidden_states": encoded["last_hidden_state"],
            "encoder_attention_mask": mask,
        }
        decoded = decode(decoder_input_ids=tokens, **source)
    past = {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in decoded.items()
        if name != "logits"
    }
    past_axes = {
        name: {0: names.BATCH, 2: PAST if ".decoder." in name else names.SEQUENCE} for name in past
    }
    token_axes: Axes = {"decoder_input_ids": {0: names.BATCH, 1: DECODER_SEQUENCE}}
    one_token = {"decoder_input_ids": tokens[:, :1], "encoder_attention_mask": mask, **past}
    return [
        _Part(ENCODER, encode, text, axes),
        _Part(DECODER, decode, {"decoder_input_ids": tokens, **source}, {**token_axes, **_SOURCE}),
        _Part(WITH_PAST, step, one_token,
              {"decoder_input_ids": {0: names.BATCH}, **_SOURCE, **past_axes}),
    ]  # fmt: skip


def _encoder_inputs(model: Any, bound: BoundModel) -> tuple[dict[str, torch.Tensor], Axes]:
    length = sample_length(_longest(model))
    mask = torch.ones(SAMPLE_BATCH, length, dtype=torch.int64)
    mask[1, length - length // 3 :] = 0
    inputs = {"input_ids": _ids(model, length, seed=0), "attention_mask": mask}
    axes = {name: {0: names.BATCH, 1: names.SEQUENCE} for name in inputs}
    own = own_class(bound.adapters.model_class)
    if own is not None:
        for name, values in own.seeded_inputs(bound.base.config, SAMPLE_BATCH).items():
            inputs[name] = torch.from_numpy(values)
            axes[name] = {0: names.BATCH, 1: own.axis}
    return inputs, axes


def _ids(model: Any, length: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLE_BATCH, length)
    return torch.randint(0, vocabulary(model), shape, generator=generator)


def _encode(model: Any) -> Callable[..., dict[str, torch.Tensor]]:
    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": model.get_encoder()(**inputs).last_hidden_state}

    return forward


def _decode(model: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the forward pass of some tokens, from the encoder's states."""

    def forward(
        decoder_input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        result = _run_decoder(
            model, decoder_input_ids, encoder_hidden_states, encoder_attention_mask, None
        )
        return {
            "logits": result.logits,
            **_present(model, result.past_key_values, "decoder"),
            **_present(model, result.past_key_values, "encoder"),
        }

    return forward


def _step(model: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the forward pass of one more token, from the cache."""

    def forward(
        decoder_input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past_key_values: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]],
    ) -> dict[str, torch.Tensor]:
        cache = _cache(past_key_values)
        batch, source = encoder_attention_mask.shape
        # Only their shape is looked at: keys and values come from the cache.
        states = (
            model.get_decoder()
            .get_input_embeddings()
            .weight.new_zeros(batch, source, int(model.config.hidden_size))
        )
        result = _run_decoder(model, decoder_input_ids, states, encoder_attention_mask, cache)
        return {
            "logits": result.logits,
            **_present(model, result.past_key_values, "decoder"),
        }

    return forward


def _run_decoder(
    model: Any, tokens: torch.Tensor, states: torch.Tensor, mask: torch.Tensor, cache: Any
) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    # The class's own forward: the instance's is this part while it is traced.
    return type(model).forward(
        model,
        attention_mask=mask,
        decoder_input_ids=tokens,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        past_key_values=cache,
        use_cache=True,
    )


def _present(model: Any, cache: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return the keys and values of one kind of attention: ``decoder``'s own or ``encoder``."""
    from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

    own = isinstance(cache, EncoderDecoderCache)
    half = getattr(cache, {"decoder": "self", "encoder": "cross"}[kind] + "_attention_cache", None)
    if not own or half is None or any(type(layer) is not DynamicLayer for layer in half.layers):
        raise GraphError(
            f"model class {type(model).__name__}: a cache that is not one growing key and value "
            "per layer and attention",
            expected=(
                "keys and values of the decoder's tokens and of the encoder's states, because the "
                "graphs hand them on from step to step"
            ),
            fix="Merge its tasks instead: mtl-export merge",
        )
    present = {}
    for index, layer in enumerate(half.layers):
        present[f"present.{index}.{kind}.key"] = layer.keys
        present[f"present.{index}.{kind}.value"] = layer.values
    return present


def _cache(past: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]) -> Any:
    """Return transformers' cache over ``{layer: {decoder|encoder: {key|value: tensor}}}``."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

    halves = []
    for kind in ("decoder", "encoder"):
        cache = DynamicCache()
        for by_kind in past.values():
            layer = DynamicLayer()
            keys, values = by_kind[kind]["key"], by_kind[kind]["value"]
            layer.lazy_initialization(keys, values)
            # Not through update(), which would leave an empty tensor to concatenate.
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        halves.append(cache)
    return EncoderDecoderCache(*halves)


def _name_tied(graph: ir.Model, model: Any, bound: BoundModel) -> None:
    """Call a parameter that has several names by the one under which the base stores it."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for known in aliases.values():
        stored = [n for n in known if n.removeprefix(bound.prefix) in bound.base.tensors]
        used = [name for name in known if name in graph.graph.initializers]
        if len(known) > 1 and stored and used and stored[0] not in used:
            graph.graph.initializers[used[0]].name = stored[0]


@contextlib.contextmanager
def _forward(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``model(...)`` be ``function(...)``: parameters keep their names."""
    model.forward = function
    try:
        yield
    finally:
        del model.forward


def checked_parts(graphs: Mapping[str, ir.Model], bound: BoundModel) -> tuple[TracedModel, ...]:
    """Return the parts, cleaned, once every adapted layer is where it must be.

    Every adapted layer is in some part. ``decoder_with_past`` has all of the decoder's but
    those that only make what it reads from the cache.
    """
    import onnx_ir.passes.common as common

    found = {}
    for stem, graph in graphs.items():
        # Stack traces with the exporting machine's paths would make bytes differ.
        common.ClearMetadataAndDocStringPass()(graph)
        number_uses(graph)
        found[stem] = list(dict.fromkeys(module_of(node) for node in markers(graph)))
    lost = set(marked_modules(bound.adapters)).difference(*found.values())
    lost |= set(found[DECODER]) - set(found[WITH_PAST]) - _behind_cache(graphs[DECODER])
    if lost:
        raise GraphError(
            f"{bound.adapters.model_class}: layers not in the graphs: {shortened(sorted(lost))}",
            expected=(
                "every adapted layer in each graph that computes it, because a layer the graph "
                "lost would be exported without its adapter"
            ),
            fix="Check that the model class is the one that was trained",
        )
    heads = bound.adapters.heads
    return tuple(
        TracedModel(
            graph,
            tuple(name for name in found[stem] if name not in heads),
            tuple(name for name in found[stem] if name in heads),
            stem,
        )
        for stem, graph in graphs.items()
    )


def _behind_cache(decoder: ir.Model) -> set[str]:
    """Return the layers that the encoder's keys and values are made by."""
    pending = [value for value in decoder.graph.outputs if ".encoder." in str(value.name)]
    seen: set[ir.Value] = set()
    modules = set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.domain == names.DOMAIN:
            modules.add(module_of(node))
        pending += [source for source in node.inputs if source is not None]
    return modules
