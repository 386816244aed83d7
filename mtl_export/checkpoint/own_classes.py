"""Model classes that transformers does not have, and that we therefore bring.

A checkpoint of such a class is a whole model: it carries the weights under its adapters
too, and its base gives no more than a config and a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtl_export.checkpoint import vl_bart_config
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.errors import GraphError


@dataclass(frozen=True, slots=True)
class OwnClass:
    """One model class.

    Attributes:
        name: What ``Checkpoint.model_class`` says.
        path: ``"module:class"``, imported lazily. The class is a transformers model with
            ``from_tensors(config, tensors, dtype)``.
        config: Returns ``config.json`` for these tensors, from the base's own.
        inputs: What it takes besides text, for people.
        seeded_inputs: Draws such inputs for so many rows, to compare models on.
    """

    name: str
    path: str
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]]
    inputs: str
    seeded_inputs: Callable[[Mapping[str, Any], int], dict[str, Array]]


OWN_CLASSES: tuple[OwnClass, ...] = (
    OwnClass(
        name=vl_bart_config.MODEL_CLASS,
        path="mtl_export.adapters.modules.vl_bart:VLBart",
        config=vl_bart_config.config_of,
        inputs="image features and boxes, and a decoder's tokens",
        seeded_inputs=vl_bart_config.seeded_inputs,
    ),
)


def own_class(name: str) -> OwnClass | None:
    """Return the class called ``name``, None if it is transformers' business."""
    return next((entry for entry in OWN_CLASSES if entry.name == name), None)


def refuse_graph(model_class: str) -> None:
    """Refuse a class that no ONNX graph can be made of yet.

    Raises:
        GraphError: It is one of ours.
    """
    entry = own_class(model_class)
    if entry is not None:
        raise GraphError(
            where=f"model class {model_class}",
            found=f"a model that takes {entry.inputs}",
            expected="a model of text alone",
            why="graphs with other inputs are not supported yet",
            fix="Merge its tasks instead: mtl-export merge",
        )
