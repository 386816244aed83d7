"""LoRA and rsLoRA: one low-rank delta per layer, the same for every task.

    h = W x + b + s (B A x + b_B)        s = alpha / r, or alpha / sqrt(r) for rsLoRA

A [r, I], B [O, r]; b_B [O] only where the up-projection was trained with a bias. b is the
base's, or a trained one beside b_B.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv:2106.09685, equation 3; Kalajdzievski, "A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA", arXiv:2312.03732, for alpha / sqrt(r).

| paper | role here | shape  |
|-------|-----------|--------|
| A     | down      | [r, I] |
| B     | up        | [O, r] |
| (b_B) | up_bias   | [O]    |
| (b)   | bias      | [O]    |

``hyper`` holds ``scaling`` where the producer's rule for s is known, else ``alpha``.
An embedding is the same layer with one-hot x: I is the vocabulary.

Normal form: down = A, up = B, core = s I; the bias becomes b + s b_B.

>>> import numpy as np
>>> one_core(scaling=2.0, rank=2).tolist()                         # [T, r, r], T = 1
[[[2.0, 0.0], [0.0, 2.0]]]
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, HyperparameterError

NAME = "lora"
ROLES = MappingProxyType({"down": "r, I", "up": "O, r"})


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one LoRA layer; the base only where ``up_bias`` was trained.

    Raises:
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
        BaseModelError: ``up_bias`` was trained, and there is no base to add it to.
    """
    values = checked_values(layer, ROLES, {"up_bias": "O", "bias": "O"})
    scaling = scaling_of(layer, values["down"].shape[0])
    return LayerAdapter(
        module=layer.module,
        down=values["down"],
        core=one_core(scaling, values["down"].shape[0]),
        up=values["up"],
        bias=trained_bias(values, scaling, base),
    )


def one_core(scaling: float, rank: int) -> Array:
    """Return the core of a set of one task, float64 ``[1, r, r]``."""
    core: Array = scaling * np.eye(rank)[None]
    return core


def scaling_of(layer: LayerTensors, rank: int) -> float:
    """Return s of one layer.

    Raises:
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known, or it is not finite.
    """
    scaling = layer.hyper.get("scaling")
    if scaling is None and "alpha" in layer.hyper:
        scaling = layer.hyper["alpha"] / rank
    if scaling is None or not np.isfinite(scaling):
        raise HyperparameterError(
            layer.module,
            "alpha",
            "the checkpoint does not carry it" if scaling is None else f"s = {scaling}",
            expected="a finite number",
            fix="Pass --alpha (or set alpha in mtl-export.toml) with the value used in training",
        )
    return float(scaling)


def trained_bias(values: Mapping[str, Array], scaling: float, base: BaseLayer) -> Array | None:
    """Return b + s b_B, float64 ``[1, O]``; None where no ``up_bias`` was trained.

    Raises:
        BaseModelError: There is no base to take b from.
    """
    if "up_bias" not in values:
        return None
    own = scaling * values["up_bias"].astype(np.float64)
    kept = values["bias"] if "bias" in values else base.bias()
    total: Array = own if kept is None else own + kept
    return total[None]


def base_weight(values: Mapping[str, Array], base: BaseLayer) -> Array:
    """Return the base weight, float32 or float64 ``[O, I]``, for families that need it.

    Raises:
        BaseModelError: There is no base, or its shape is not that of ``up @ down``.
    """
    weight = base.weight()
    expected = (values["up"].shape[0], values["down"].shape[1])
    if weight.shape != expected:
        raise BaseModelError(
            f"{base.module}.weight: shape {list(weight.shape)}",
            expected=str(list(expected)),
            fix="Pass the base that the adapter was trained on to --base",
        )
    return weight
