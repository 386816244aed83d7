"""Model classes that transformers does not have, and that we therefore bring.

A checkpoint of such a class is a whole model: it carries the weights under its adapters
too, and its base gives no more than a config and a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtl_export.checkpoint.formats import vl_bart_config
from mtl_export.errors import HyperparameterError

if TYPE_CHECKING:
    from mtl_export.checkpoint.checkpoint import LayerTensors
    from mtl_export.checkpoint.tensors import Array, Tensor


@dataclass(frozen=True, slots=True)
class OwnClass:
    """One model class.

    Attributes:
        name: What ``Checkpoint.model_class`` says.
        path: ``"module:class"``, imported lazily. The class is a transformers model with
            ``from_tensors(config, tensors, dtype)``.
        config: Returns ``config.json`` for these tensors, from the base's own and from what the
            layers' ``hyper`` says of ``switches``.
        seeded_inputs: Draws what it takes besides text for so many rows, ``[rows, n, ...]``, to
            trace and to compare models on.
        axis: Name of the second axis of these inputs.
        switches: Of the training command, off or on (0 or 1): they change what the model computes
            and leave no tensor. Every layer's ``hyper`` has the same.
    """

    name: str
    path: str
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, float]], dict[str, Any]]
    seeded_inputs: Callable[[Mapping[str, Any], int], dict[str, Array]]
    axis: str
    switches: tuple[str, ...] = ()


OWN_CLASSES: tuple[OwnClass, ...] = (
    OwnClass(
        name=vl_bart_config.MODEL_CLASS,
        path="mtl_export.adapters.modules.vl_bart:VLBart",
        config=vl_bart_config.config_of,
        seeded_inputs=vl_bart_config.seeded_inputs,
        axis="regions",
        switches=(vl_bart_config.DOWNSAMPLE,),
    ),
)


def own_class(name: str) -> OwnClass | None:
    """Return the class called ``name``, None if it is transformers' business."""
    return next((entry for entry in OWN_CLASSES if entry.name == name), None)


def switches_of(name: str) -> tuple[str, ...]:
    """Return the switches of the class called ``name``; none if it is transformers'."""
    own = own_class(name)
    return () if own is None else own.switches


def check_switches(name: str, layers: Mapping[str, LayerTensors]) -> None:
    """Refuse layers of the class called ``name`` that do not say how its switches were.

    Raises:
        HyperparameterError: With the switch.
    """
    for switch in switches_of(name):
        for layer in layers.values():
            if layer.hyper.get(switch) not in {0.0, 1.0}:
                raise HyperparameterError(
                    layer.module,
                    switch,
                    "the checkpoint does not carry it",
                    expected=(
                        f"whether the training command had --{switch}, because it changes what the "
                        "model computes and leaves no tensor"
                    ),
                    fix=(
                        f"Pass --{switch} or --no-{switch} (or set {switch} in mtl-export.toml) as "
                        "in training"
                    ),
                )
