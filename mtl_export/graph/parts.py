"""A model as the graphs it runs as: one for most, several for models that generate.

    encoders, classifiers, vision      model
    causal language models             prefill, decode
    encoder-decoders                   encoder, decoder, decoder_with_past

Every part is traced once and serves all tasks and layouts.
"""

from __future__ import annotations

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.graph import names
from mtl_export.graph.causal_lm import trace_causal_lm
from mtl_export.graph.seq2seq import trace_seq2seq
from mtl_export.graph.trace import TracedModel, trace


def trace_parts(bound: BoundModel, opset: int = names.OPSET) -> tuple[TracedModel, ...]:
    """Return the graphs that ``bound`` runs as, each with its own ``stem``.

    Raises:
        GraphError: The exporter cannot trace the model, a marker got lost, or a language
            model keeps something else than keys and values.
        BaseModelError: The heads do not fit the model's features.
    """
    if is_causal_lm(bound.adapters.model_class):
        return trace_causal_lm(bound, opset)
    if is_seq2seq(bound.adapters.model_class, bound.base.config):
        return trace_seq2seq(bound, opset)
    return (trace(bound, opset),)
