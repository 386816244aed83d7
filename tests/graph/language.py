"""Tiny random causal language models, each with an MTL-LoRA adapter of three tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import class_named, quiet_transformers
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.tensors import Array
from tests.adapters import toys

TASKS = (Task("summary", 0), Task("reply", 1), Task("title", 2))
VOCABULARY, POSITIONS, WINDOW = 61, 48, 5
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
GROUPED = SIZES | {"intermediate_size": 20, "num_key_value_heads": 2}
# Grouped heads; a window of few tokens; the same in one of two layers; biases of queries, keys
# and values alone, which layers adapt; Conv1D and no groups.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "MistralForCausalLM": GROUPED | {"head_dim": 6, "sliding_window": WINDOW},
    "Qwen3ForCausalLM": GROUPED | {
        "head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW - 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Qwen2ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "GPT2LMHeadModel": SIZES | {"n_inner": 20},
}  # fmt: skip
# Not traced by the tests of graphs: one fails before, the other is refused.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Phi3ForCausalLM": GROUPED | {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 14,
        },
    },
}  # fmt: skip
ADAPTED = re.compile(r".*\.(q_proj|v_proj|down_proj|c_attn|mlp\.c_proj)")


def language_base(folder: Path, model_class: str, *, seed: int = 0) -> Path:
    """Write a base of that class to ``folder`` and return it."""
    from transformers import GenerationConfig

    concrete = class_named(model_class)
    model = concrete(concrete.config_class(**{**CONFIGS, **OTHERS}[model_class])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    model.generation_config = GenerationConfig(eos_token_id=2)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def language_bound(folder: Path, model_class: str) -> BoundModel:
    """Return base and adapter below ``folder``, bound."""
    base = language_base(folder / "base", model_class)
    tensors = open_base(str(base)).tensors
    layers = {}
    for index, name in enumerate(sorted(tensors)):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and ADAPTED.fullmatch(module):
            shape = tensors[name].shape
            outputs, inputs = shape[::-1] if "GPT2" in model_class else shape
            layers[module] = toys.layer_values(
                index, inputs=inputs, outputs=outputs, rank=3, dtype="F32"
            )
    write_folder(
        folder / "adapter",
        tasks=TASKS,
        layers=layers,
        heads={},
        alpha=3.0,
        temperature=toys.TEMPERATURE,
        model_class=model_class,
        base=BaseReference(base.name, open_base(str(base)).sha256),
    )
    return toys.bound_model(base, folder / "adapter")


def prompts(batch: int, length: int, *, seed: int = 3) -> tuple[Array, Array]:
    """Return ids and mask ``[B, S]``, row b with b columns of padding on the left."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, VOCABULARY, (batch, length), dtype=np.int64)
    mask = (np.arange(length) >= np.arange(batch)[:, None] % (length - 1)).astype(np.int64)
    return ids, mask


def moved_right(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Return the same rows with their padding on the right."""
    order = np.argsort(mask == 0, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)
