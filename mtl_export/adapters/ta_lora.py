"""TA-LoRA: a shared low-rank branch, and n branches gated by a learnt task embedding.

    h_t = W x + b + s . (B_0 A_0 x + sum_i g_i(e_t) B_i A_i x)        s = alpha / r
    g(e_t) = sigmoid(G e_t + c), each branch by itself, or softmax(G e_t + c) over the n

A_i [r, I], B_i [O, r], i = 0 ... n; e_t [d], G [n, d], c [n] or absent. The gate sees the
task's embedding and never x, so it is a constant of the task.

Source: the task-adaptive reading of Yang et al., AAAI 2025, doi 10.1609/AAAI.V39I20.35509:
learnable task-identifier embeddings and gated low-rank branches beside a shared one (not
the prompt tuning of arXiv:2505.00009). No other code exists for it, so what that leaves
open (s, c, and that branch 0 is never gated) is fixed here.

| here                | role           | shape         |
|---------------------|----------------|---------------|
| A_0, A_1 ... A_n    | down           | [n + 1, r, I] |
| B_0, B_1 ... B_n    | up             | [n + 1, O, r] |
| e_1 ... e_T         | task_embedding | [T, d]        |
| G                   | gate           | [n, d]        |
| c                   | gate_bias      | [n], optional |

``hyper``: ``alpha`` (or ``scaling`` = s), and ``gate_softmax``: 1 for softmax, 0 for sigmoid.
Layers may share one e_t while training; a checkpoint holds it with every layer.

Normal form: down = [A_0; ...; A_n], up = [B_0 ... B_n],
core_t = s diag(1, g_1(e_t) 1, ..., g_n(e_t) 1), the gates in float64.

>>> import numpy as np
>>> embedding, gate = np.array([[0.0], [2.0]]), np.array([[1.0], [-1.0]])
>>> gates(embedding, gate, None, is_softmax=False).round(3).tolist()   # [T, n]
[[0.5, 0.5], [0.881, 0.119]]
>>> task_cores(np.array([[0.5, 0.25]]), rank=1, scale=4.0)[0].diagonal().tolist()
[4.0, 2.0, 1.0]
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.lora import scaling_of
from mtl_export.adapters.mtl_lora import softmax
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import HyperparameterError

NAME = "ta_lora"
ROLES = MappingProxyType(
    {"down": "n + 1, r, I", "up": "n + 1, O, r", "task_embedding": "T, d", "gate": "n, d"}
)
OPTIONAL_ROLES = MappingProxyType({"gate_bias": "n"})


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one TA-LoRA layer; the base is not needed.

    Raises:
        HyperparameterError: ``alpha`` is unknown, or which gate was trained.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
    """
    values = checked_values(layer, ROLES, OPTIONAL_ROLES)
    branches, rank, in_features = values["down"].shape
    weights = gates(
        values["task_embedding"],
        values["gate"],
        values.get("gate_bias"),
        is_softmax=has_softmax_gate(layer),
    )
    return LayerAdapter(
        module=layer.module,
        down=values["down"].reshape(branches * rank, in_features),
        core=task_cores(weights, rank=rank, scale=scaling_of(layer, rank)),
        up=np.concatenate(list(values["up"]), axis=1),
    )


def gates(embedding: Array, gate: Array, bias: Array | None, *, is_softmax: bool) -> Array:
    """Return every task's gates, float64 ``[T, n]``, free of overflow.

    Args:
        embedding: ``[T, d]``.
        gate: G ``[n, d]``.
        bias: c ``[n]``, or None.
        is_softmax: Softmax over the branches; else a sigmoid of each.
    """
    logits = embedding.astype(np.float64) @ gate.astype(np.float64).T
    if bias is not None:
        logits = logits + bias.astype(np.float64)
    if is_softmax:
        return softmax(logits)
    # sigmoid(z) by way of tanh, which never overflows.
    result: Array = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return result


def task_cores(weights: Array, *, rank: int, scale: float) -> Array:
    """Return every task's core, float64 ``[T, (n + 1) r, (n + 1) r]``.

    Args:
        weights: The gates, ``[T, n]``.
        rank: r.
        scale: s.
    """
    with_shared = np.concatenate([np.ones((len(weights), 1)), weights], axis=1)
    diagonals = scale * np.repeat(with_shared, rank, axis=1)
    cores: Array = diagonals[:, :, None] * np.eye(diagonals.shape[1])
    return cores


def has_softmax_gate(layer: LayerTensors) -> bool:
    """Return whether the gate is a softmax, else it is a sigmoid.

    Raises:
        HyperparameterError: The checkpoint does not say.
    """
    value = layer.hyper.get("gate_softmax")
    if value not in {0.0, 1.0}:
        raise HyperparameterError(
            layer.module,
            "gate_softmax",
            "the checkpoint does not carry it" if value is None else f"{value:g}",
            expected="1 (softmax over the branches) or 0 (sigmoid of each)",
            fix="Save the adapter with save_checkpoint, which writes it",
        )
    return value == 1.0
