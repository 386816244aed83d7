"""Tiny encoder-decoders with an adapter in every linear layer, on disk and as graphs.

The T5 has a gated feed-forward layer and as many layers on both sides, which transformers'
own generation needs; the BART has fewer on one. Sizes are odd and all different.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats.own_folder import write_folder
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.parts import trace_parts
from mtl_export.graph.trace import TracedModel
from mtl_export.graph.writer import write_graphs
from tests.adapters import toys

VOCABULARY, POSITIONS, WIDTH, HEADS = 59, 40, 12, 3
TASKS = tuple(Task(name, index, (), "headless") for index, name in enumerate(("to_de", "short")))


@dataclass(frozen=True)
class Exported:
    """A toy and what was made of it.

    Attributes:
        bound: Its adapter on its base.
        parts: The trace.
        single: Folder of the single graph.
        merged: Folders of the merged graphs, in id order.
    """

    bound: BoundModel
    parts: tuple[TracedModel, ...]
    single: Path
    merged: tuple[Path, ...]


def t5() -> Any:
    """Return a T5 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config: Any = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=5, d_ff=20, num_layers=1, num_decoder_layers=1,
        num_heads=HEADS, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def bart() -> Any:
    """Return a BART with random weights, whose settings force and forbid tokens."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=20,
        decoder_ffn_dim=18, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    model: Any = BartForConditionalGeneration(config)
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.min_length = 5
    return model


MODELS = {"t5": t5, "bart": bart}


def bound_toy(kind: str, folder: Path) -> BoundModel:
    """Return the toy ``kind`` with its adapter, both written below ``folder``."""
    return bound_model(MODELS[kind](), folder)


def bound_model(model: Any, folder: Path) -> BoundModel:
    """Return ``model`` with an adapter in every linear layer, both written below ``folder``."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    with quiet_transformers():
        model.save_pretrained(folder / "base")
    shapes = {
        name: layer.weight.shape
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    layers = {
        name: toys.layer_values(
            seed, tasks=len(TASKS), inputs=shape[1], outputs=shape[0], dtype="F32"
        )
        for seed, (name, shape) in enumerate(shapes.items())
    }
    write_folder(
        folder / "adapter", tasks=TASKS, layers=layers, heads={}, alpha=2.0, temperature=0.5,
        model_class=type(model).__name__, base=BaseReference("toy", ""),
    )  # fmt: skip
    return toys.bound_model(folder / "base", folder / "adapter")


def exported_toy(kind: str, folder: Path) -> Exported:
    """Return the toy ``kind`` as graphs of both layouts, from one trace."""
    bound = bound_toy(kind, folder)
    parts = trace_parts(bound)
    single = folder / "single"
    single.mkdir()
    write_graphs({part.stem: routed_graph(part, bound) for part in parts}, bound, single, None)
    merged = []
    for task in TASKS:
        own = folder / task.name
        own.mkdir()
        models = {part.stem: merged_graph(part, bound, task) for part in parts}
        write_graphs(models, bound, own, task)
        merged.append(own)
    return Exported(bound, parts, single, tuple(merged))


def rows(batch: int, sequence: int, seed: int = 0) -> dict[str, Array]:
    """Return seeded ragged text."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(max(1, sequence // 2), sequence + 1, batch)
    return {
        "input_ids": generator.integers(0, VOCABULARY, (batch, sequence)),
        "attention_mask": (np.arange(sequence) < lengths[:, None]).astype(np.int64),
    }
