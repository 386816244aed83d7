"""Toy layers, bases and checkpoints: odd sizes, nothing zero, no two things alike.

Equal sizes hide a transpose, equal B_i hide a wrong mixing, zero biases hide a lost one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.adapters import mtl_lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, LayerTensors, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from tests.factories import HIDDEN, INTERMEDIATE, VOCABULARY, toy_base

ALPHA, TEMPERATURE = 7.0, 0.3
RANK, UPS = 5, 2
TASKS = (
    Task("sentiment", 0, ("negative", "positive"), "single_label_classification"),
    Task("topics", 1, ("ads", "jobs", "news", "sport"), "multi_label_classification"),
    Task("relevance", 2, ("score",), "regression"),
)
# One of each: attention, the widening and the narrowing linear layer, and [B, I] rows.
MODULES = {
    "bert.encoder.layer.0.attention.self.query": (HIDDEN, HIDDEN),
    "bert.encoder.layer.0.intermediate.dense": (INTERMEDIATE, HIDDEN),
    "bert.encoder.layer.1.attention.self.value": (HIDDEN, HIDDEN),
    "bert.encoder.layer.1.output.dense": (HIDDEN, INTERMEDIATE),
    "bert.pooler.dense": (HIDDEN, HIDDEN),
}
HEAD = "classifier"


def layer_values(
    seed: int,
    *,
    rank: int = RANK,
    ups: int = UPS,
    tasks: int = 3,
    inputs: int = 5,
    outputs: int = 7,
    diagonal: bool = False,
    scaler: bool = False,
    dtype: str = "F64",
) -> dict[str, Array]:
    """Return one layer's tensors by role, every value at least 0.05 away from zero."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        signs = generator.choice([-1.0, 1.0], shape)
        return np.asarray(signs * generator.uniform(0.05, 0.8, shape)).astype(NUMPY_DTYPES[dtype])

    values = {
        "down": draw(rank, inputs),
        "lambda": draw(tasks, rank) if diagonal else draw(tasks, rank, rank),
        "up": draw(ups, outputs, rank),
        "mixing": draw(tasks, ups),
    }
    if scaler:
        values["scaler"] = draw()
    return values


def layer_tensors(
    values: Mapping[str, Array],
    *,
    module: str = "toy.dense",
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
) -> LayerTensors:
    """Return ``values`` as a checkpoint's layer, held in memory."""
    return LayerTensors(
        module,
        {role: memory_tensor(f"{module}.{role}", value) for role, value in values.items()},
        {"alpha": alpha, "temperature": temperature},
    )


def normal_form(layer: LayerTensors) -> LayerAdapter:
    """Return the layer's normal form; MTL-LoRA needs no base for it."""
    return mtl_lora.layer_adapter(layer, BaseLayer(layer.module, None))


def memory_tensor(name: str, value: Array) -> Tensor:
    """Return ``value`` as a stored tensor."""
    dtype = next(key for key, known in NUMPY_DTYPES.items() if known == value.dtype)
    return Tensor(name, dtype, value.shape, lambda: value)


def paper_rows(
    values: Mapping[str, Array],
    weight: Array,
    bias: Array,
    x: Array,
    task_ids: Array,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
) -> Array:
    """Return h_t of MTL-LoRA for rows x ``[B, I]`` or ``[B, S, I]``, in plain loops.

    h_t = W x + b + (alpha / r) sigmoid(scaler) sum_i softmax(w_t / tau)_i B_i Lambda_t A x
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    rows = [
        [_paper_row(values, weight, bias, token, int(task), alpha, temperature) for token in row]
        for row, task in zip(flat, task_ids, strict=True)
    ]
    return np.array(rows).reshape(*x.shape[:-1], weight.shape[0])


def _paper_row(
    values: Mapping[str, Array],
    weight: Array,
    bias: Array,
    x: Array,
    task: int,
    alpha: float,
    temperature: float,
) -> list[float]:
    down, up = values["down"].astype(float), values["up"].astype(float)
    lambdas, mixing = values["lambda"][task].astype(float), values["mixing"][task].astype(float)
    rank = len(down)
    z = [sum(down[j, i] * x[i] for i in range(len(x))) for j in range(rank)]
    if lambdas.ndim == 1:
        z = [lambdas[j] * z[j] for j in range(rank)]
    else:
        z = [sum(lambdas[j, k] * z[k] for k in range(rank)) for j in range(rank)]
    largest = max(float(w) for w in mixing)
    powers = [math.exp((float(w) - largest) / temperature) for w in mixing]
    scale = alpha / rank
    if "scaler" in values:
        scale *= 1.0 / (1.0 + math.exp(-float(values["scaler"])))
    return [
        float(
            sum(weight[o, i] * x[i] for i in range(len(x)))
            + bias[o]
            + scale
            * sum(
                powers[n] / sum(powers) * sum(up[n, o, j] * z[j] for j in range(rank))
                for n in range(len(up))
            )
        )
        for o in range(weight.shape[0])
    ]


def checkpoint_parts(
    *, diagonal: bool = False, scaler: bool = True, dtype: str = "F32"
) -> dict[str, Any]:
    """Return what ``write_folder`` takes for the toy base, without its base."""
    generator = np.random.default_rng(5)
    layers = {
        module: layer_values(
            seed, inputs=shape[1], outputs=shape[0], diagonal=diagonal, scaler=scaler, dtype=dtype
        )
        for seed, (module, shape) in enumerate(MODULES.items(), start=20)
    }
    heads = {
        HEAD: {
            task.name: (
                generator.normal(size=(len(task.labels), HIDDEN)).astype(NUMPY_DTYPES[dtype]),
                generator.normal(size=len(task.labels)).astype(NUMPY_DTYPES[dtype]),
            )
            for task in TASKS
        }
    }
    return {
        "tasks": TASKS,
        "layers": layers,
        "heads": heads,
        "alpha": ALPHA,
        "temperature": TEMPERATURE,
        "model_class": "BertForSequenceClassification",
    }


def write_checkpoint(folder: Path, parts: Mapping[str, Any], base: BaseReference) -> Path:
    """Write the toy checkpoint ``parts`` to ``folder``."""
    write_folder(folder, base=base, **parts)
    return folder


def bound_model(base: Path, checkpoint: Path) -> BoundModel:
    """Return the checkpoint bound to the base, both on disk."""
    opened = open_checkpoint(checkpoint)
    opened_base = open_base(str(base))
    return bind(opened, read_adapters(opened, opened_base), opened_base)


def toy_bound(folder: Path, parts: Mapping[str, Any] | None = None) -> BoundModel:
    """Write base and checkpoint below ``folder`` and return them bound."""
    base = folder / "base"
    if not base.exists():
        toy_base(base)
    reference = BaseReference("toy/bert", open_base(str(base)).sha256)
    checkpoint = write_checkpoint(folder / "adapter", parts or checkpoint_parts(), reference)
    return bound_model(base, checkpoint)


def token_rows(batch: int, sequence: int, seed: int = 3) -> dict[str, Array]:
    """Return seeded text inputs, ragged where there is room."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(max(1, sequence // 2), sequence + 1, batch)
    return {
        "input_ids": generator.integers(0, VOCABULARY, (batch, sequence)),
        "attention_mask": (np.arange(sequence) < lengths[:, None]).astype(np.int64),
        "token_type_ids": generator.integers(0, 2, (batch, sequence)),
    }
