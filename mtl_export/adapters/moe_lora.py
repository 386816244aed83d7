"""MoE-LoRA gated by the task id: E small experts, weighted per task.

    h_t = W x + b + s . sum_i g_ti . B_i A_i x        g_t = softmax(gate_t)

A_i [q, I], B_i [O, q], q = r / E, s = alpha / r with the full r. The gate sees the task's
embedding and never x, so it is a constant of the task.

Source: https://github.com/pUmpKin-Co/MTL-LoRA/blob/7848a70/src/adapter/moelora.py, after
Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
Applications", SIGIR 2024, arXiv:2310.18339, equations 5 to 7.

| paper                 | role here | shape     |
|-----------------------|-----------|-----------|
| A_i                   | down      | [E, q, I] |
| B_i                   | up        | [E, O, q] |
| W_T e_t (gate logits) | gate      | [T, E]    |

Normal form: down = [A_1; ...; A_E], up = [B_1 ... B_E], core_t = s diag(g_t1 1, ..., g_tE 1).

>>> import numpy as np
>>> task_cores(gate=np.array([[0.0, 0.0]]), expert_rank=1, scale=4.0)[0].tolist()
[[2.0, 0.0], [0.0, 2.0]]
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

NAME = "moe_lora"
ROLES = MappingProxyType({"down": "E, q, I", "up": "E, O, q", "gate": "T, E"})


def layer_adapter(layer: LayerTensors, base: BaseLayer) -> LayerAdapter:
    """Return the normal form of one task-gated MoE-LoRA layer; the base is not needed.

    Raises:
        HyperparameterError: ``alpha`` is unknown.
        CheckpointError: A tensor is missing, or the shapes contradict each other.
    """
    values = checked_values(layer, ROLES)
    experts, expert_rank, in_features = values["down"].shape
    rank = experts * expert_rank
    return LayerAdapter(
        module=layer.module,
        down=values["down"].reshape(rank, in_features),
        core=task_cores(
            gate=values["gate"], expert_rank=expert_rank, scale=scaling_of(layer, rank)
        ),
        up=np.concatenate(list(values["up"]), axis=1),
    )


def task_cores(*, gate: Array, expert_rank: int, scale: float) -> Array:
    """Return every task's core, float64 ``[T, r, r]``.

    Args:
        gate: ``[T, E]``, before the softmax.
        expert_rank: q.
        scale: alpha / r.
    """
    weights = softmax(gate.astype(np.float64))
    diagonals = scale * np.repeat(weights, expert_rank, axis=1)
    cores: Array = diagonals[:, :, None] * np.eye(diagonals.shape[1])
    return cores
