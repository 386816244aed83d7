"""Tiny random models of every kind that runs as one graph, each with an MTL-LoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import class_named, quiet_transformers
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, HeadTensors, Task
from mtl_export.checkpoint.tensors import Array
from tests.adapters import toys

TASKS = (
    Task("sentiment", 0, ("negative", "positive"), "single_label_classification"),
    Task("topics", 1, ("ads", "jobs", "news", "sport"), "multi_label_classification"),
    Task("relevance", 2, ("score",), "regression"),
)
BARE_TASKS = tuple(Task(task.name, task.index) for task in TASKS)
VOCABULARY, POSITIONS = 53, 40
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": POSITIONS,
}  # fmt: skip
IMAGE, CHANNELS = 16, 3


@dataclass(frozen=True)
class Kind:
    """One model class.

    Attributes:
        name: For test ids.
        model_class: In transformers; its config class is derived from it.
        config: What its config is made of.
        adapted: Pattern of the adapted modules' names.
        heads: The modules of which every task has its own; the last gives the logits.
    """

    name: str
    model_class: str
    config: Mapping[str, Any]
    adapted: str
    heads: Sequence[str] = ()
    output: str = "logits"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_vision(self) -> bool:
        """Whether it takes images."""
        return "image_size" in self.config

    def rows(self, batch: int, sequence: int, seed: int = 3) -> dict[str, Array]:
        """Return seeded inputs, texts ragged where there is room."""
        generator = np.random.default_rng(seed)
        if self.is_vision:
            shape = (batch, CHANNELS, IMAGE, IMAGE)
            return {"pixel_values": generator.normal(size=shape).astype(np.float32)}
        rows = toys.token_rows(batch, sequence, seed)
        rows["token_type_ids"] %= int(self.config.get("type_vocab_size", 0)) or 1
        if not self.config.get("type_vocab_size"):
            del rows["token_type_ids"]
        return rows


BERT = TEXT | {"type_vocab_size": 2}
DEBERTA = TEXT | {
    "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "position_biased_input": False, "pooler_hidden_size": 12,
}  # fmt: skip
ROBERTA = TEXT | {"type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}
KINDS = (
    Kind("bert tokens", "BertForTokenClassification", BERT,
         r"0\.attention\.self\.query|1\.intermediate\.dense", ["classifier"]),
    Kind("bert features", "BertModel", BERT, r"0\.attention\.self\.query|1\.output\.dense",
         output="last_hidden_state"),
    Kind("roberta", "RobertaForSequenceClassification", ROBERTA,
         r"self\.value|1\.output\.dense", ["classifier.dense", "classifier.out_proj"]),
    Kind("distilbert", "DistilBertForSequenceClassification",
         {"vocab_size": VOCABULARY, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20,
          "max_position_embeddings": POSITIONS},
         r"q_lin|1\.ffn\.lin2|pre_classifier", ["classifier"]),
    Kind("deberta-v2", "DebertaV2ForSequenceClassification",
         DEBERTA, r"value_proj|1\.output\.dense|pooler\.dense", ["classifier"]),
    # One layer, run as often as the config says.
    Kind("albert", "AlbertForSequenceClassification",
         TEXT | {"type_vocab_size": 2, "embedding_size": 6},
         r"attention\.query|attention\.dense|\.ffn$|mapping_in", ["classifier"]),
    Kind("modernbert", "ModernBertForSequenceClassification",
         TEXT | {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0,
                 "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
                 "cls_token_id": 1, "sep_token_id": 2},
         r"attn\.Wqkv|mlp\.Wo|head\.dense", ["classifier"]),
    Kind("vit", "ViTForImageClassification",
         {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
          "intermediate_size": 20, "image_size": IMAGE, "patch_size": 4, "num_channels": CHANNELS},
         r"attention\.query|q_proj|1\.output\.dense", ["classifier"]),
    Kind("swin", "SwinForImageClassification",
         {"image_size": IMAGE, "patch_size": 2, "num_channels": CHANNELS, "embed_dim": 6,
          "depths": [2, 2], "num_heads": [2, 3], "window_size": 2},
         r"query|q_proj|intermediate\.dense|reduction", ["classifier"]),
)  # fmt: skip


def toy_base(kind: Kind, folder: Path) -> Path:
    """Write the model of ``kind`` with seeded weights, none of them 0 or 1."""
    model_class = class_named(kind.model_class)
    config = model_class.config_class(**kind.config)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm = bool((parameter == 1).all())
            parameter.copy_(noise + 1 if is_norm else noise)
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def toy_bound(kind: Kind, folder: Path) -> BoundModel:
    """Return a base of ``kind`` in ``folder`` with an adapter and heads, bound."""
    base = open_base(str(toy_base(kind, folder)))
    names = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in base.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    layers = {
        module: toys.layer_tensors(
            toys.layer_values(seed, inputs=shape[1], outputs=shape[0], dtype="F32"), module=module
        )
        for seed, (module, shape) in enumerate(sorted(names.items()), start=20)
        if re.search(kind.adapted, module)
    }
    assert layers, names
    checkpoint = Checkpoint(
        path=folder, format="memory", family="mtl_lora",
        tasks=TASKS if kind.heads else BARE_TASKS, layers=layers,
        heads={module: _heads(kind, module, names[module]) for module in kind.heads},
        base=BaseReference(), model_class=kind.model_class, sha256="0" * 64,
    )  # fmt: skip
    return bind(checkpoint, read_adapters(checkpoint, base), base)


def _heads(kind: Kind, module: str, shape: tuple[int, ...]) -> tuple[HeadTensors, ...]:
    generator = np.random.default_rng(len(module))
    is_last = module == kind.heads[-1]
    heads = []
    for task in TASKS:
        outputs = len(task.labels) if is_last else shape[0]
        weight = generator.normal(size=(outputs, shape[1])).astype(np.float32)
        bias = generator.normal(size=outputs).astype(np.float32)
        heads.append(
            HeadTensors(
                toys.memory_tensor(f"{module}.weight", weight),
                toys.memory_tensor(f"{module}.bias", bias),
            )
        )
    return tuple(heads)
