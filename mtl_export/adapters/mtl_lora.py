"""MTL-LoRA: one down-projection, n up-projections mixed per task, a small Lambda per task.

    h_t = W x + s c . sum_i p_ti . B_i Lambda_t A x        p_t = softmax(w_t / tau)

A [r, I], Lambda_t [r, r] or its diagonal [r], B_i [O, r], w_t [n], tau > 0,
s = alpha / r, and c = sigmoid(scaler) where a learnt scale was trained, else 1.

Source: Yang et al., "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning",
AAAI 2025, doi 10.1609/AAAI.V39I20.35509, equation of h_t. The factor s is in both
public implementations though not in the paper; c is in
https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/src/adapter/mlora.py, which also
fixes the side of Lambda: B Lambda A, not B Lambda^T A.

| paper            | role here | shape             |
|------------------|-----------|-------------------|
| A                | down      | [r, I]            |
| Lambda_t         | lambda    | [T, r, r], [T, r] |
| B_i              | up        | [n, O, r]         |
| w_t              | mixing    | [T, n]            |
| (learnt scale)   | scaler    | []                |

Normal form: down = A, up = [B_1 ... B_n], core_t = s c [p_t1 Lambda_t; ...; p_tn Lambda_t].

>>> import numpy as np
>>> core = task_cores(
...     lambdas=np.array([[[2.0, 1.0], [0.0, 1.0]]]),  # one task, r = 2
...     mixing=np.array([[0.0, 0.0]]),                 # two B_i, mixed half and half
...     temperature=0.1, scale=4.0)
>>> core.shape                                          # [T, n r, r]
(1, 4, 2)
>>> core[0].tolist()
[[4.0, 2.0], [0.0, 2.0], [4.0, 2.0], [0.0, 2.0]]
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
from mtl_export.errors import HyperparameterError

NAME = "mtl_lora"
ROLES = MappingProxyType(
    {"down": "r, I", "lambda": "T, r, r or T, r", "up": "n, O, r", "mixing": "T, n"}
)
OPTIONAL_ROLES = MappingProxyType({"scaler": ""})


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one MTL-LoRA layer; the base is not needed.

    Raises:
        HyperparameterError: ``alpha`` or ``temperature`` is unknown, or tau <= 0.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
    """
    values = checked_values(layer, ROLES, OPTIONAL_ROLES)
    rank = values["down"].shape[0]
    scale = hyper_parameter(layer, "alpha") / rank * learnt_scale(values)
    up_count, out_features, _ = values["up"].shape
    return LayerAdapter(
        module=layer.module,
        down=values["down"],
        core=task_cores(
            lambdas=values["lambda"],
            mixing=values["mixing"],
            temperature=hyper_parameter(layer, "temperature"),
            scale=scale,
        ),
        up=np.ascontiguousarray(values["up"].transpose(1, 0, 2)).reshape(
            out_features, up_count * rank
        ),
    )


def task_cores(*, lambdas: Array, mixing: Array, temperature: float, scale: float) -> Array:
    """Return every task's core, float64 ``[T, n r, r]``.

    Args:
        lambdas: ``[T, r, r]``, or ``[T, r]`` for diagonals.
        mixing: ``[T, n]``, before the softmax.
        temperature: tau > 0.
        scale: alpha / r, times the learnt scale if there is one.
    """
    weights = softmax(mixing.astype(np.float64) / temperature)
    full = lambdas.astype(np.float64)
    if full.ndim == 2:
        full = full[:, :, None] * np.eye(full.shape[1])
    task_count, rank, _ = full.shape
    cores: Array = scale * (weights[:, :, None, None] * full[:, None, :, :])
    return cores.reshape(task_count, weights.shape[1] * rank, rank)


def softmax(logits: Array) -> Array:
    """Return the softmax over the last axis, free of overflow."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def learnt_scale(values: Mapping[str, Array]) -> float:
    """Return sigmoid(scaler), or 1 where no scale was trained."""
    if "scaler" not in values:
        return 1.0
    return float(1.0 / (1.0 + np.exp(-values["scaler"].astype(np.float64))))


def hyper_parameter(layer: LayerTensors, name: str) -> float:
    """Return ``alpha`` or ``temperature`` of one layer.

    Raises:
        HyperparameterError: It is unknown, not finite, or a temperature that is not above 0.
    """
    value = layer.hyper.get(name)
    if value is None:
        raise HyperparameterError(
            layer.module,
            name,
            "the checkpoint does not carry it",
            expected="a number",
            fix=f"Pass --{name} (or set {name} in mtl-export.toml) with the value used in training",
        )
    if not np.isfinite(value) or (name == "temperature" and value <= 0):
        raise HyperparameterError(
            layer.module,
            name,
            f"{value}",
            expected="a finite number" + (" above 0" if name == "temperature" else ""),
            fix=f"Pass the value used in training to --{name}",
        )
    return float(value)
