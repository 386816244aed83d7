"""A model as the graphs it runs as: one for most, several for models that generate.

    encoders, classifiers, vision      model
    causal language models             prefill, decode
    encoder-decoders                   encoder, decoder, decoder_with_past

Every part is traced once and serves all tasks and layouts.
"""

from __future__ import annotations

import logging
from typing import Any

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import model_of_shapes
from mtl_export.checkpoint.model_class import is_causal_lm, is_seq2seq
from mtl_export.checkpoint.own_classes import own_class
from mtl_export.errors import MtlExportError
from mtl_export.graph import names
from mtl_export.graph.causal_lm import samples, trace_causal_lm
from mtl_export.graph.marking import mark
from mtl_export.graph.seq2seq import refuse_other_inputs, sample_parts, trace_seq2seq
from mtl_export.graph.trace import TracedModel, sample_inputs, trace


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


def refusal_of(bound: BoundModel) -> MtlExportError | None:
    """Return why ``trace_parts`` refuses ``bound``, as far as shapes alone tell it.

    No weight is read. None where they tell nothing, or the model would be traced; PyTorch's
    exporter may give up all the same.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if own_class(bound.adapters.model_class) is not None:
        return None
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _prepare(model_of_shapes(bound), bound)
    except MtlExportError as error:
        # A cause is an operator that does not run on shapes alone, which says nothing.
        return None if error.__cause__ else error
    finally:
        log.setLevel(level)
    return None


def _prepare(model: Any, bound: BoundModel) -> None:
    """Do what ``trace_parts`` does before it traces."""
    if is_causal_lm(bound.adapters.model_class):
        samples(model)
    elif is_seq2seq(bound.adapters.model_class, bound.base.config):
        refuse_other_inputs(model)
        sample_parts(model, bound)
    else:
        sample_inputs(model)
    mark(model, bound)
