"""Trace the base model once, with an opaque marker in place of all that tasks change.

``marking`` describes the markers; ``lower`` replaces every one. One trace serves all tasks
and layouts.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import base_model, quiet_transformers
from mtl_export.checkpoint.own_classes import refuse_graph
from mtl_export.errors import GraphError, shortened
from mtl_export.graph import names
from mtl_export.graph.marking import mark, marked_modules
from mtl_export.graph.passes.markers import markers, module_of

OPSET = 20
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


def trace(bound: BoundModel) -> TracedModel:
    """Return the base of ``bound`` as a float32 graph with markers.

    Raises:
        GraphError: The exporter cannot trace the model, a marker got lost, or tasks change a
            module of a kind that has no marker.
        BaseModelError: The heads do not fit the model's features.
    """
    refuse_graph(bound.adapters.model_class)
    model = base_model(bound, torch.float32)
    # Only logits: a graph with a KV cache has other inputs and is traced by a pass of its own.
    model.config.use_cache = False
    mark(model, bound)
    inputs = _sample_inputs(model)
    traced = _exported(model, inputs)
    _name_dimensions(traced)
    return _checked(traced, bound)


def _sample_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return seeded text inputs: ids inside the vocabulary, one row padded."""
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLE_BATCH, SAMPLE_SEQUENCE)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1, -3:] = 0
    candidates = {
        "input_ids": torch.randint(0, int(config.vocab_size), shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }
    return {
        name: candidates[name]
        for name in TEXT_INPUTS
        if name in accepted
        and (name != "token_type_ids" or getattr(config, "type_vocab_size", 0) > 0)
    }


def _exported(model: Any, inputs: dict[str, Any]) -> ir.Model:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    longest = int(getattr(model.config, "max_position_embeddings", 0) or 2**15)
    batch = torch.export.Dim(names.BATCH, min=1, max=2**20)
    sequence = torch.export.Dim(names.SEQUENCE, min=1, max=longest)
    config = OnnxConfig(
        dynamic_shapes={name: {0: batch, 1: sequence} for name in inputs}, opset_version=OPSET
    )
    try:
        with _quiet_exporter():
            exported = OnnxExporter().export(model, inputs, config=config)
    except Exception as error:
        # torch.export and torch.onnx raise many unrelated types; all mean the same to the user.
        raise GraphError(
            where=type(model).__name__,
            found=f"the ONNX exporter gave up: {str(error).strip().splitlines()[0]}",
            expected="a model that torch.export can trace with a dynamic batch and sequence",
            fix="Merge per task instead (mtl-export merge), or report the model class",
        ) from error
    # transformers 5.20, the newest for Python 3.10, returns torch's own ONNXProgram.
    result: Any = exported
    model_ir: ir.Model = getattr(result, "program", None) or result.model
    return model_ir


def _name_dimensions(model: ir.Model) -> None:
    """Give the exporter's symbols (s18, s41) the names that users and builders read."""
    first = model.graph.inputs[0].shape
    if first is None:
        raise GraphError(where="graph input", found="no shape", expected="[batch, sequence]")
    renamed = {
        re.compile(rf"\b{re.escape(str(dim.value))}\b"): name
        for dim, name in zip(first, (names.BATCH, names.SEQUENCE), strict=True)
        if isinstance(dim, ir.SymbolicDim)
    }
    values = [*model.graph.inputs]
    for node in model.graph.all_nodes():
        values += node.outputs
    for value in values:
        if value.shape is None:
            continue
        dims: list[int | ir.SymbolicDim | str | None] = []
        for dim in value.shape:
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                text = str(dim.value)
                for symbol, name in renamed.items():
                    text = symbol.sub(name, text)
                dims.append(text)
            else:
                dims.append(dim)
        value.shape = ir.Shape(dims)


def _checked(model: ir.Model, bound: BoundModel) -> TracedModel:
    """Return the trace, cleaned, once every adapted layer has exactly one marker."""
    import onnx_ir.passes.common as common

    # Stack traces with the exporting machine's paths would make bytes differ between machines.
    common.ClearMetadataAndDocStringPass()(model)
    found = [module_of(node) for node in markers(model)]
    expected = sorted(marked_modules(bound.adapters))
    if sorted(found) != expected:
        lost = sorted(set(expected) - set(found))
        twice = sorted({name for name in found if found.count(name) > 1})
        raise GraphError(
            where=bound.adapters.model_class,
            found=f"layers not in the graph: {shortened(lost)}; used twice: {shortened(twice)}",
            expected="every adapted layer exactly once in the graph",
            why="a layer the graph lost would be exported without its adapter",
            fix="Check that the model class is the one that was trained",
        )
    heads = bound.adapters.heads
    return TracedModel(
        model,
        tuple(name for name in found if name not in heads),
        tuple(name for name in found if name in heads),
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's chatter (version notes, torchvision, progress) off the terminal."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with (
            quiet_transformers(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
