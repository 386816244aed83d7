"""Tiny models of every architecture that the gate is tried on, each with an MTL-LoRA adapter.

Three tasks each, of different widths where they have heads of their own. Sizes are odd and
all different, no two B_i alike, no tensor zero: whatever is mixed up gives other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_export.adapters.modules.base import class_named, quiet_transformers
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.tensors import Array
from tests.adapters import toys
from tests.checkpoint import peft_toys
from tests.factories import toy_base, toy_tokenizer

# Two tasks have heads of one width: only these can be swapped without a change of shape.
CLASSIFIERS = (
    Task("ads_rel", 0, ("no", "yes"), "single_label_classification"),
    Task("topic", 1, ("who", "what", "where", "when"), "multi_label_classification"),
    Task("spam", 2, ("ham", "junk"), "single_label_classification"),
)
SPEAKERS = (Task("summary", 0), Task("reply", 1), Task("title", 2))
VOCABULARY, POSITIONS = 53, 119
RANK, UPS, ALPHA, TEMPERATURE = 3, 2, 5.0, 0.7


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: As the tables print it.
        family: ``encoder``, ``decoder`` or ``seq2seq``.
        model_class: In transformers; its config class is derived from it.
        config: What its config is made of.
        adapted: Pattern of the adapted modules' names.
        heads: The modules of which every task has its own; the last gives the logits.
        later: What only an existing config takes.
    """

    name: str
    family: str
    model_class: str
    config: Mapping[str, Any]
    adapted: str
    heads: tuple[str, ...] = ()
    later: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Return its tasks."""
        return CLASSIFIERS if self.heads else SPEAKERS


_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20,
}  # fmt: skip
_BERT = _TEXT | {"max_position_embeddings": POSITIONS}
_SPOKEN = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
_GROUPED = _SPOKEN | {"intermediate_size": 20, "num_key_value_heads": 2}
_ENCODED = r"self\.(query|value)|intermediate\.dense|\d\.output\.dense"
_SAID = r"(q_proj|v_proj|down_proj|c_attn|mlp\.c_proj)$"
ENCODER = Model(
    "roberta", "encoder", "RobertaForSequenceClassification",
    _TEXT | {"type_vocab_size": 1, "pad_token_id": 0, "max_position_embeddings": POSITIONS + 1},
    _ENCODED + r"|classifier\.dense", ("classifier.out_proj",),
)  # fmt: skip
DECODER = Model(
    "llama", "decoder", "LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}, _SAID
)
SEQ2SEQ = Model(
    "t5", "seq2seq", "T5ForConditionalGeneration",
    {"vocab_size": VOCABULARY, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2,
     "num_decoder_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"},
    r"\.(q|v|wo)$", later={"decoder_start_token_id": 0},
)  # fmt: skip
OTHERS = (
    Model("bert", "encoder", "BertForSequenceClassification", _BERT | {"type_vocab_size": 2},
          _ENCODED, ("classifier",)),
    Model("distilbert", "encoder", "DistilBertForSequenceClassification",
          {"vocab_size": VOCABULARY, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20,
           "max_position_embeddings": POSITIONS},
          r"q_lin|1\.ffn\.lin2|pre_classifier", ("classifier",)),
    Model("mistral", "decoder", "MistralForCausalLM",
          _GROUPED | {"head_dim": 6, "sliding_window": 5}, _SAID),
    Model("qwen3", "decoder", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}, _SAID),
    Model("gpt2", "decoder", "GPT2LMHeadModel", _SPOKEN | {"n_inner": 20}, _SAID),
    Model("bart", "seq2seq", "BartForConditionalGeneration",
          {"vocab_size": VOCABULARY, "d_model": 12, "encoder_layers": 1, "decoder_layers": 2,
           "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 20,
           "decoder_ffn_dim": 18, "max_position_embeddings": POSITIONS},
          r"(q_proj|v_proj|fc2)$"),
)  # fmt: skip
MODELS = (ENCODER, DECODER, SEQ2SEQ, *OTHERS)
TOML = 'base = "base"\ncheckpoint = "adapter"\n'


def write_model(model: Model, folder: Path, *, seed: int = 0) -> Path:
    """Write ``base/``, ``adapter/`` and an ``mtl-export.toml`` to ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_base(model, folder / "base", seed=seed)
    write_adapter(model, folder, seed=seed)
    (folder / "mtl-export.toml").write_text(TOML)
    return folder


def write_base(model: Model, folder: Path, *, seed: int) -> None:
    """Write the base: random weights, norms around 1, no tensor zero."""
    model_class = class_named(model.model_class)
    config = model_class.config_class(**model.config)
    for name, value in model.later.items():
        setattr(config, name, value)
    network = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            is_norm = bool((parameter == 1).all())
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if is_norm else noise)
    with quiet_transformers():
        network.save_pretrained(folder)
    if model.family == "encoder":
        toy_tokenizer(folder)


def write_adapter(model: Model, folder: Path, *, seed: int) -> None:
    """Write an adapter for the base in ``folder``."""
    base = open_base(str(folder / "base"))
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in sorted(base.tensors.items())
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    layers: dict[str, dict[str, Array]] = {}
    for module, shape in shapes.items():
        if re.search(model.adapted, module):
            outputs, inputs = shape[::-1] if model.name == "gpt2" else shape
            layers[module] = toys.layer_values(
                1000 * seed + len(layers), rank=RANK, ups=UPS, inputs=inputs, outputs=outputs,
                dtype="F32",
            )  # fmt: skip
    write_folder(
        folder / "adapter",
        tasks=model.tasks,
        layers=layers,
        heads={module: _heads(model, module, shapes[module], seed) for module in model.heads},
        alpha=ALPHA,
        temperature=TEMPERATURE,
        model_class=model.model_class,
        base=BaseReference("toy", base.sha256),
    )


def _heads(
    model: Model, module: str, shape: tuple[int, ...], seed: int
) -> dict[str, tuple[Array, Array]]:
    generator = np.random.default_rng([seed, len(module)])
    heads = {}
    for task in model.tasks:
        outputs = len(task.labels) if module == model.heads[-1] else shape[0]
        weight = generator.normal(size=(outputs, shape[1])).astype(np.float32)
        heads[task.name] = (weight, generator.normal(size=outputs).astype(np.float32))
    return heads


def write_dora(folder: Path) -> Path:
    """Write a project whose tasks are three DoRA adapters of PEFT's, and return it."""
    toy_base(folder / "base")
    for seed, name in enumerate(("mail", "chat", "post")):
        tensors = peft_toys.head(2, seed=seed)
        for module in (peft_toys.QUERY, peft_toys.NARROW):
            tensors |= peft_toys.lora(module, rank=3, seed=seed, lora_magnitude_vector="O")
        fields = {"r": 3, "use_dora": True, "target_modules": ["query", "output.dense"]}
        peft_toys.write(folder / "adapter" / name, tensors, fields)
    (folder / "mtl-export.toml").write_text(TOML + 'tasks = ["mail", "chat", "post"]\n')
    return folder
