"""DoRA: LoRA gives the direction of each row of the weight, a trained vector its length.

    V = W + s B A        W' = diag(m / ||V||) V        h = W' x + b

A [r, I], B [O, r], m [O]; ||V|| is the L2 norm of each row of V, one per output;
s = alpha / r (or alpha / sqrt(r)) counts in the norm. The bias is left alone.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024,
arXiv:2402.09353, equation 5, whose columns are this project's rows.

| paper | role here | shape  |
|-------|-----------|--------|
| A     | down      | [r, I] |
| B     | up        | [O, r] |
| m     | magnitude | [O]    |

``hyper`` as for LoRA. An embedding is the same layer with one-hot x: I is the vocabulary,
and ||V|| has one entry per embedding dimension.

Normal form: LoRA's, with gain = m / ||V||.

>>> import numpy as np
>>> row_gain(np.array([10.0, 1.0]), np.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
[[2.0, 0.5]]
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mtl_export.adapters import lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError

NAME = "dora"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one DoRA layer; the norm needs the base weight.

    Raises:
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known.
        CheckpointError: A tensor is missing, the shapes contradict each other, or a row of
            V has no length.
        BaseModelError: There is no base, or it has another shape.
    """
    values = checked_values(layer, {**lora.ROLES, "magnitude": "O"})
    rank = values["down"].shape[0]
    weight = lora.base_weight(values, base).astype(np.float64)
    direction = LayerAdapter(
        module=layer.module,
        down=values["down"],
        core=lora.one_core(lora.scaling_of(layer, rank), rank),
        up=values["up"],
    )
    directions = weight + direction.delta(0)
    gain = checked_gain(layer.module, values["magnitude"], directions, "W + s B A")
    return dataclasses.replace(direction, gain=gain)


def row_gain(magnitude: Array, directions: Array) -> Array:
    """Return m / ||V||, float64 ``[1, O]``.

    Args:
        magnitude: m ``[O]``.
        directions: V ``[O, I]``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        gain: Array = magnitude / np.linalg.norm(directions, axis=1)
    return gain[None]


def checked_gain(module: str, magnitude: Array, directions: Array, formula: str) -> Array:
    """Return ``row_gain`` of the layer ``module``, in whose error V is called ``formula``.

    Raises:
        CheckpointError: A row of V has no length.
    """
    gain = row_gain(magnitude.astype(np.float64), directions)
    if not np.isfinite(gain).all():
        raise CheckpointError(
            f"{module}: row {int(np.argmin(np.isfinite(gain[0])))} of {formula} is zero",
            expected="rows with a direction: DoRA divides each row by its length",
            fix="Check that the base is the one the adapter was trained on",
        )
    return gain
