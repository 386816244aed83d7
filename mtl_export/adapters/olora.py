"""OLoRA: LoRA that starts from the base's QR decomposition, part of which leaves the base.

    h = W' x + b + s B A x        W' = W - s Q_r R_r

A [r, I], B [O, r], W = Q R, Q_r the first r columns of Q and R_r the first r rows of R;
s = alpha / r (or alpha / sqrt(r)). W' is computed again from W here, as PEFT does when it
loads. The signs that a QR decomposition is free to choose cancel in Q_r R_r.

Source: Bueyuekakyuez, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
arXiv:2406.01775; that s counts in W': https://github.com/huggingface/peft,
release 0.21.2, ``tuners/lora/layer.py`` (olora_init).

Tensors and ``hyper`` are LoRA's.

Normal form: down = [A; R_r], up = [B, Q_r], core = diag(s, -s).

>>> import numpy as np
>>> left, right = first_directions(np.array([[2.0, 1.0], [0.0, 3.0]]), 1)
>>> (left @ right).tolist()
[[2.0, 1.0], [0.0, 0.0]]
"""

from __future__ import annotations

import numpy as np

from mtl_export.adapters import lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError

NAME = "olora"


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one OLoRA layer; the QR needs the base weight.

    Raises:
        AdapterError: The base stores the weight transposed.
        HyperparameterError: Neither ``scaling`` nor ``alpha`` is known.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
        BaseModelError: There is no base, or it has another shape.
    """
    if base.stored_transposed:
        raise AdapterError(
            f"{layer.module}: OLoRA on a Conv1D layer",
            expected="linear layers: PEFT decomposes the weight as it is stored",
            fix='Train with another initialisation, such as "pissa"',
        )
    values = checked_values(layer, lora.ROLES)
    rank = values["down"].shape[0]
    scaling = lora.scaling_of(layer, rank)
    left, right = first_directions(lora.base_weight(values, base), rank)
    return LayerAdapter(
        module=layer.module,
        down=np.concatenate([values["down"], right]),
        core=np.diag(np.repeat([scaling, -scaling], rank))[None],
        up=np.concatenate([values["up"], left], axis=1),
    )


def first_directions(weight: Array, rank: int) -> tuple[Array, Array]:
    """Return Q_r ``[O, r]`` and R_r ``[r, I]``.

    Args:
        weight: ``[O, I]``, taken in float64.
        rank: r.
    """
    left, right = np.linalg.qr(weight.astype(np.float64))
    return left[:, :rank], right[:rank]
