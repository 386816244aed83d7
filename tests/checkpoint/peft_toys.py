"""PEFT folders as PEFT 0.21 writes them, without PEFT: for the toy BERT of ``factories``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mtl_export.checkpoint.tensors import Array
from tests import factories

HIDDEN, INTERMEDIATE, VOCABULARY, LONGEST = (
    factories.HIDDEN, factories.INTERMEDIATE, factories.VOCABULARY, factories.POSITIONS,
)  # fmt: skip
QUERY = "bert.encoder.layer.0.attention.self.query"
NARROW = "bert.encoder.layer.1.output.dense"
WORDS = "bert.embeddings.word_embeddings"
POSITIONS = "bert.embeddings.position_embeddings"
GPT2 = "transformer.h.0."
# module -> (outputs, inputs), an embedding being a layer of one-hot inputs
SIZES = {
    QUERY: (HIDDEN, HIDDEN),
    NARROW: (HIDDEN, INTERMEDIATE),
    "bert.pooler.dense": (HIDDEN, HIDDEN),
    WORDS: (HIDDEN, VOCABULARY),
    POSITIONS: (HIDDEN, LONGEST),
    f"{GPT2}attn.c_attn": (3 * HIDDEN, HIDDEN),
    f"{GPT2}attn.c_proj": (HIDDEN, HIDDEN),
    f"{GPT2}mlp.c_fc": (INTERMEDIATE, HIDDEN),
    "transformer.wte": (HIDDEN, VOCABULARY),
}


def config(**fields: Any) -> dict[str, Any]:
    """Return an ``adapter_config.json`` of PEFT 0.21.2, changed by ``fields``."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": "toy/bert", "bias": "none",
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 6, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
        "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": ["classifier", "score"], "monteclora_config": None,
        "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2,
        "rank_pattern": {}, "revision": None, "target_modules": ["query"],
        "target_parameters": None, "task_type": "SEQ_CLS", "trainable_token_indices": None,
        "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
        "velora_config": None, **fields,
    }  # fmt: skip


def lora(module: str, *, rank: int = 2, seed: int = 0, **extra: str) -> dict[str, Array]:
    """Return the tensors of one adapted module, by the end of their key.

    Args:
        module: A key of ``SIZES``.
        rank: r.
        seed: What makes tasks differ.
        extra: Further tensors: ``lora_diag="r"`` has one entry per rank.
    """
    generator = np.random.default_rng([seed, len(module), rank])
    outputs, inputs = SIZES[module]
    names = ("lora_A.weight", "lora_B.weight")
    if module.endswith(("embeddings", "wte")):
        names = ("lora_embedding_A", "lora_embedding_B")
    shapes: dict[str, tuple[int, ...]] = {names[0]: (rank, inputs), names[1]: (outputs, rank)}
    for name, length in extra.items():
        shapes[name.replace("__", ".")] = ({"O": outputs, "r": rank}[length],)
    return {f"{module}.{name}": draw(generator, *shape) for name, shape in shapes.items()}


def head(labels: int, *, module: str = "classifier", seed: int = 0) -> dict[str, Array]:
    """Return a saved classification head."""
    generator = np.random.default_rng([seed, labels])
    return {
        f"{module}.weight": draw(generator, labels, HIDDEN),
        f"{module}.bias": draw(generator, labels),
    }


def draw(generator: np.random.Generator, *shape: int) -> Array:
    """Return float32 values at least 0.05 away from zero."""
    signs = generator.choice([-1.0, 1.0], shape)
    values: Array = (signs * generator.uniform(0.05, 0.6, shape)).astype(np.float32)
    return values


def write(
    folder: Path,
    tensors: Mapping[str, Array],
    fields: Mapping[str, Any] | None = None,
    *,
    pickled: bool = False,
) -> Path:
    """Write one adapter: ``tensors`` by key without PEFT's prefix, ``fields`` of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**(fields or {}))))
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    if pickled:
        import torch

        torch.save(
            {key: torch.from_numpy(value) for key, value in named.items()},
            folder / "adapter_model.bin",
        )
    else:
        save_file(named, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    return folder


def gpt2_base(folder: Path) -> Path:
    """Write a seeded one-layer GPT-2 and return its folder."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from mtl_export.adapters.modules.base import quiet_transformers

    settings = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=3, n_positions=LONGEST,
        n_inner=INTERMEDIATE, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(settings)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm = ".ln_" in name and name.endswith("weight")
            parameter.copy_(values + 1.0 if is_norm else values)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder
