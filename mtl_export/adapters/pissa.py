"""PiSSA: LoRA that starts as the base's principal part, which leaves the base.

    h = W' x + b + s B A x        W' = W - U_r S_r V_r^T

A [r, I], B [O, r], W = U S V^T, r the largest singular triplets; s = alpha / r (or
alpha / sqrt(r)). W' is computed again from W here, as PEFT does when it loads. The fast
variant, whose SVD is randomised, cannot be: a reader must refuse it.

Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
Large Language Models", NeurIPS 2024, arXiv:2404.02948, equations 2 to 4; that s B_0 A_0 =
U_r S_r V_r^T: https://github.com/huggingface/peft, release 0.21.2, ``tuners/lora/layer.py``
(pissa_init).

Tensors and ``hyper`` are LoRA's.

Normal form: down = [A; V_r^T], up = [B, U_r], core = diag(s, -S_r).

>>> import numpy as np
>>> left, values, right = principal_directions(np.diag([3.0, 1.0, 2.0]), 1)
>>> (left * values @ right).tolist()
[[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters import lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array

NAME = "pissa"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one PiSSA layer; the SVD needs the base weight.

    Raises:
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
        BaseModelError: There is no base, or it has another shape.
    """
    values = checked_values(layer, lora.ROLES)
    rank = values["down"].shape[0]
    left, largest, right = principal_directions(lora.base_weight(values, base), rank)
    scaled = np.full(rank, lora.scaling_of(layer, rank))
    return LayerAdapter(
        module=layer.module,
        down=np.concatenate([values["down"], right]),
        core=np.diag(np.concatenate([scaled, -largest]))[None],
        up=np.concatenate([values["up"], left], axis=1),
    )


def principal_directions(weight: Array, rank: int) -> tuple[Array, Array, Array]:
    """Return U_r ``[O, r]``, S_r ``[r]`` and V_r^T ``[r, I]``: the r largest singular triplets.

    Args:
        weight: ``[O, I]``, taken in float64.
        rank: r.
    """
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]
