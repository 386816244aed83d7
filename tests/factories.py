"""Toy bases and checkpoints, made on the fly: tiny, seeded, and unequal everywhere.

Sizes are odd and all different so that a transpose, a swapped task or a dropped term
is caught; no tensor is zero and no two tasks or up-projections are alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import CONFIG_FILE, WEIGHTS_FILE, write_folder
from mtl_export.checkpoint.tensors import Array

HIDDEN, HEADS, INTERMEDIATE, VOCABULARY, LAYERS, POSITIONS = 12, 3, 20, 53, 2, 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghij"),
    "nurse", "night", "shift", "free", "money", "who", "what", "good", "bad", "film", ".", "?",
)  # fmt: skip
MODULES = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "intermediate.dense": (INTERMEDIATE, HIDDEN),
    "output.dense": (HIDDEN, INTERMEDIATE),
}
HEAD_MODULE = "classifier"
MODEL_CLASS = "BertForSequenceClassification"
TASKS = (
    Task("ads_rel", 0, ("no", "yes"), "single_label_classification"),
    Task("topic", 1, ("who", "what", "where", "when"), "single_label_classification"),
    Task("spam", 2, ("ham", "junk", "spam"), "single_label_classification"),
)


def toy_base(folder: Path, *, seed: int = 0, hidden: int = HIDDEN) -> Path:
    """Write a two-layer BertModel with a WordPiece tokenizer to ``folder`` and return it."""
    import torch
    from transformers import BertConfig, BertModel

    from mtl_export.adapters.modules.base import quiet_transformers

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=POSITIONS,
    )
    model = BertModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # BERT starts with biases of 0 and norms of 1, which would hide a lost one.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
    with quiet_transformers():
        model.save_pretrained(folder)
    toy_tokenizer(folder)
    return folder


def toy_tokenizer(folder: Path) -> None:
    """Write a WordPiece tokenizer with ``VOCABULARY`` entries to ``folder``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def toy_checkpoint(
    folder: Path,
    base: Path | None = None,
    *,
    tasks: Sequence[Task] = TASKS,
    rank: int = 3,
    up_projections: int = 2,
    alpha: float = 5.0,
    temperature: float = 0.7,
    lambda_format: str = "full",
    learn_scale: bool = False,
    head_bias: bool = True,
    seed: int = 1,
) -> Path:
    """Write an MTL-LoRA checkpoint in our format to ``folder`` and return it.

    Args:
        folder: Folder to create.
        base: The base it claims to be trained on; None leaves that unsaid.
        tasks: In id order; their label counts are the heads' widths.
        rank: r.
        up_projections: n.
        alpha: s = alpha / r.
        temperature: tau.
        lambda_format: ``full`` or ``diagonal``.
        learn_scale: Add a learnt scale to every layer.
        head_bias: Give every head a bias.
        seed: Decides the values.
    """
    generator = np.random.default_rng(seed)

    def random(*shape: int) -> Array:
        values: Array = generator.normal(0.0, 0.5, shape).astype(np.float32)
        return values

    def layer(outputs: int, inputs: int) -> dict[str, Array]:
        lambda_shape = (rank, rank) if lambda_format == "full" else (rank,)
        tensors = {
            "down": random(rank, inputs),
            "lambda": random(len(tasks), *lambda_shape),
            "up": random(up_projections, outputs, rank),
            "mixing": random(len(tasks), up_projections),
        }
        return tensors | ({"scaler": random()} if learn_scale else {})

    layers = {
        f"bert.encoder.layer.{index}.{module}": layer(*shape)
        for index in range(LAYERS)
        for module, shape in MODULES.items()
    }
    heads = {
        task.name: (
            random(len(task.labels), HIDDEN),
            random(len(task.labels)) if head_bias else None,
        )
        for task in tasks
    }
    write_folder(
        folder,
        tasks=tuple(tasks),
        layers=layers,
        heads={HEAD_MODULE: heads},
        alpha=alpha,
        temperature=temperature,
        model_class=MODEL_CLASS,
        base=BaseReference(str(base.name), open_base(str(base)).sha256)
        if base
        else BaseReference(),
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's ``adapter_config.json``."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_numbers(folder: Path, **changes: float | None) -> None:
    """Change (or with None remove) the training numbers of every layer of a checkpoint."""
    layers = json.loads((folder / CONFIG_FILE).read_text())["layers"]
    for entry in layers.values():
        kept = {**entry["hyper"], **changes}
        entry["hyper"] = {name: value for name, value in kept.items() if value is not None}
    edit_config(folder, layers=layers)


def edit_tensors(folder: Path, **changes: Array | None) -> None:
    """Replace, add (or with None remove) tensors of a checkpoint; ``__`` stands for a dot."""
    from safetensors.numpy import load_file, save_file

    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, str(path))
