"""Model classes that transformers does not have, and that we therefore bring.

A checkpoint of such a class is a whole model: it carries the weights under its adapters
too, and its base gives no more than a config and a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint import vl_bart_config

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array, Tensor


@dataclass(frozen=True, slots=True)
class OwnClass:
    """One model class.

    Attributes:
        name: What ``Checkpoint.model_class`` says.
        path: ``"module:class"``, imported lazily. The class is a transformers model with
            ``from_tensors(config, tensors, dtype)``.
        config: Returns ``config.json`` for these tensors, from the base's own.
        seeded_inputs: Draws what it takes besides text for so many rows, ``[rows, n, ...]``, to
            trace and to compare models on.
        axis: Name of the second axis of these inputs.
    """

    name: str
    path: str
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], dict[str, Any]]
    seeded_inputs: Callable[[Mapping[str, Any], int], dict[str, Array]]
    axis: str


OWN_CLASSES: tuple[OwnClass, ...] = (
    OwnClass(
        name=vl_bart_config.MODEL_CLASS,
        path="mtl_export.adapters.modules.vl_bart:VLBart",
        config=vl_bart_config.config_of,
        seeded_inputs=vl_bart_config.seeded_inputs,
        axis="regions",
    ),
)


def own_class(name: str) -> OwnClass | None:
    """Return the class called ``name``, None if it is transformers' business."""
    return next((entry for entry in OWN_CLASSES if entry.name == name), None)
