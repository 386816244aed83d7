"""MultiLoRA: n parallel LoRAs with learnt output scalings, the same for every task.

    h = W x + b + s . sum_i diag(c_i) B_i A_i x        s = alpha / r

A_i [r, I], B_i [O, r], c_i [O].

Source: Wang et al., "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning",
arXiv:2311.11501, equation 4; s and the shapes as in
https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/src/adapter/multilora.py.

| paper   | role here    | shape     |
|---------|--------------|-----------|
| A_i     | down         | [n, r, I] |
| B_i     | up           | [n, O, r] |
| scaling | scaling_rows | [n, O]    |

Normal form: down = [A_1; ...; A_n], up = [diag(c_1) B_1 ... diag(c_n) B_n] in float64, for
the scalings sit between W's rows and B, where no core reaches; core = s I.

>>> import numpy as np
>>> scaled_up(np.ones((2, 3, 1)), np.array([[1., 2., 3.], [4., 5., 6.]])).tolist()
[[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.lora import one_core, scaling_of
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array

NAME = "multi_lora"
ROLES = MappingProxyType({"down": "n, r, I", "up": "n, O, r", "scaling_rows": "n, O"})


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one MultiLoRA layer; the base is not needed.

    Raises:
        HyperparameterError: ``alpha`` is unknown.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
    """
    values = checked_values(layer, ROLES)
    count, rank, in_features = values["down"].shape
    return LayerAdapter(
        module=layer.module,
        down=values["down"].reshape(count * rank, in_features),
        core=one_core(scaling_of(layer, rank), count * rank),
        up=scaled_up(values["up"], values["scaling_rows"]),
    )


def scaled_up(up: Array, scaling_rows: Array) -> Array:
    """Return ``[diag(c_1) B_1 ... diag(c_n) B_n]``: float64 ``[O, n r]``.

    Args:
        up: ``[n, O, r]``.
        scaling_rows: ``[n, O]``.
    """
    scaled = up.astype(np.float64) * scaling_rows.astype(np.float64)[:, :, None]
    return np.concatenate(list(scaled), axis=1)
