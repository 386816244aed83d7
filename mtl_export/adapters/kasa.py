"""KaSA: LoRA with a trained diagonal, on a base without its least singular directions.

    h = W' x + b + s B diag(d) A x        W' = U_p S_p V_p^T, the k - r largest of W's k

A [r, I], B [O, r], d [r], W = U S V^T with k = min(O, I) singular values, s = alpha / r
(or alpha / sqrt(r)). W' is computed again from W here, as PEFT does when it loads.

Source: Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language
Models", ICLR 2025, arXiv:2412.06071, section 3; that the weights are kept relative
to W': https://github.com/huggingface/peft, release 0.21.2, ``tuners/lora/variants.py``.

| paper       | role here | shape  |
|-------------|-----------|--------|
| A           | down      | [r, I] |
| B           | up        | [O, r] |
| Delta Sigma | diagonal  | [r]    |

``hyper`` as for LoRA.

Normal form: down = [A; V_m^T], up = [B, U_m], core = diag(s d, -S_m), with m the r least
singular directions: W + up core down = W' + s B diag(d) A.

>>> import numpy as np
>>> left, values, right = least_directions(np.diag([3.0, 1.0, 2.0]), 1)
>>> (left * values @ right).tolist()
[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters import lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array

NAME = "kasa"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one KaSA layer; the SVD needs the base weight.

    Raises:
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
        BaseModelError: There is no base, or it has another shape.
    """
    values = checked_values(layer, {**lora.ROLES, "diagonal": "r"})
    weight = lora.base_weight(values, base)
    rank = values["down"].shape[0]
    left, least, right = least_directions(weight, rank)
    scaled = lora.scaling_of(layer, rank) * values["diagonal"].astype(np.float64)
    return LayerAdapter(
        module=layer.module,
        down=np.concatenate([values["down"], right]),
        core=np.diag(np.concatenate([scaled, -least]))[None],
        up=np.concatenate([values["up"], left], axis=1),
    )


def least_directions(weight: Array, rank: int) -> tuple[Array, Array, Array]:
    """Return U_m ``[O, r]``, S_m ``[r]`` and V_m^T ``[r, I]``: the r least singular triplets.

    Args:
        weight: ``[O, I]``, taken in float64.
        rank: r.
    """
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return left[:, -rank:], values[-rank:], right[-rank:]
