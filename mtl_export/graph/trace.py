"""Trace the base model once, with an opaque marker in place of all that tasks change.

``marking`` describes the markers; ``lower`` replaces every one. One trace serves all tasks
and layouts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import base_model
from mtl_export.checkpoint.model_inputs import PIXEL_VALUES, image_shape, longest_sequence
from mtl_export.checkpoint.model_outputs import answers_among
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.export import exported
from mtl_export.graph.marking import mark, marked_modules, unmark
from mtl_export.graph.passes.markers import markers, module_of, number_uses
from mtl_export.graph.row_order import note_row_orders
from mtl_export.graph.sampling import vocabulary

# Lengths that no model has by accident, so that no size is mistaken for a constant.
SAMPLE_BATCH, SAMPLE_SEQUENCE = 3, 11
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class TracedModel:
    """A graph with markers.

    Attributes:
        model: Initializers carry their state-dict names; never changed, lowering clones it.
        modules: Names of the other modules that tasks change, in graph order.
        heads: Names of the head modules, in graph order.
        stem: Name of its file, without ``.onnx``.
    """

    model: ir.Model
    modules: tuple[str, ...]
    heads: tuple[str, ...]
    stem: str = "model"


def trace(bound: BoundModel, opset: int = names.OPSET) -> TracedModel:
    """Return the base of ``bound`` as a float32 graph with markers.

    Raises:
        GraphError: The exporter cannot trace the model, a marker got lost, or tasks change a
            module of a kind that has no marker.
        BaseModelError: The heads do not fit the model's features.
    """
    model = base_model(bound, torch.float32)
    # Only logits: a graph with a KV cache has other inputs and is traced by a pass of its own.
    model.config.use_cache = False
    originals = mark(model, bound)
    inputs = sample_inputs(model)
    traced = _exported(model, inputs, opset)
    _drop_states(traced)
    checked = checked_trace(traced, bound)
    unmark(model, originals)
    note_row_orders(checked.model, model, originals, inputs)
    return checked


def _drop_states(model: ir.Model) -> None:
    """Leave hidden states beside logits out, as those of a detector's encoder."""
    import onnx_ir.passes.common as common

    outputs = model.graph.outputs
    kept = answers_among(str(value.name) for value in outputs)
    outputs[:] = [value for value in outputs if value.name in kept]
    common.RemoveUnusedNodesPass()(model)


def sample_length(longest: int) -> int:
    """Return how long a sample text is, in a model of so many positions; 0 for no limit."""
    return min(SAMPLE_SEQUENCE, longest or SAMPLE_SEQUENCE)


def sample_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return seeded inputs: images, or ids inside the vocabulary with one row padded.

    Raises:
        GraphError: The model takes something else, or its config does not say how much.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    if main not in {PIXEL_VALUES, "input_ids"}:
        raise GraphError(
            f"{type(model).__name__}: a model that reads {main}",
            expected=(
                "a model that reads text alone, or images alone, because it is traced with random "
                "token ids or an image"
            ),
            fix="Merge per task instead (mtl-export merge)",
        )
    if main == PIXEL_VALUES:
        image = (SAMPLE_BATCH, *_image_shape(model))
        return {PIXEL_VALUES: torch.randn(image, generator=generator)}
    accepted = inspect.signature(model.forward).parameters
    length = sample_length(longest_sequence(config.to_dict()))
    shape = (SAMPLE_BATCH, length)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, length - length // 3 :] = 0
    candidates = {
        "input_ids": torch.randint(0, vocabulary(model), shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }
    return {
        name: candidates[name]
        for name in TEXT_INPUTS
        if name in accepted
        and (name != "token_type_ids" or getattr(config, "type_vocab_size", 0) > 0)
    }


def _image_shape(model: Any) -> tuple[int, int, int]:
    shape = image_shape(model.config.to_dict())
    if shape is None:
        raise GraphError(
            f"{type(model).__name__}: a vision model whose config has no image_size",
            expected=(
                "one size for all images, because the graph is traced with an image of that size"
            ),
            fix="Add image_size to config.json of the base",
        )
    return shape


def _exported(model: Any, inputs: dict[str, torch.Tensor], opset: int) -> ir.Model:
    # Texts are [batch, sequence]; of images only the number is free.
    axes = {
        name: {0: names.BATCH, 1: names.SEQUENCE} if value.ndim == 2 else {0: names.BATCH}
        for name, value in inputs.items()
    }
    limits = {names.SEQUENCE: longest_sequence(model.config.to_dict())}
    return exported(model, inputs, axes, limits, opset=opset)


def checked_trace(model: ir.Model, bound: BoundModel, stem: str = "model") -> TracedModel:
    """Return the trace, cleaned, once every adapted layer has a marker.

    Raises:
        GraphError: A marker got lost.
    """
    import onnx_ir.passes.common as common

    # Stack traces with the exporting machine's paths would make bytes differ between machines.
    common.ClearMetadataAndDocStringPass()(model)
    number_uses(model)
    found = tuple(dict.fromkeys(module_of(node) for node in markers(model)))
    lost = set(marked_modules(bound.adapters)).difference(found)
    if lost:
        raise GraphError(
            f"{bound.adapters.model_class}: layers not in the graph: {shortened(sorted(lost))}",
            expected=(
                "every adapted layer in the graph, because a layer the graph lost would be "
                "exported without its adapter"
            ),
            fix="Check that the model class is the one that was trained",
        )
    heads = bound.adapters.heads
    return TracedModel(
        model,
        tuple(name for name in found if name not in heads),
        tuple(name for name in found if name in heads),
        stem,
    )
