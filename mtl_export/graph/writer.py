"""Write a lowered graph as a folder: graph, external data, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import companion_files
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.sentence_embedding import METADATA_KEY, SentenceEmbedding
from mtl_export.checkpoint.sentence_pipeline import Pipeline, pooled_pipeline
from mtl_export.graph.external_data import (
    SharedData,
    WrittenFile,
    externalised,
    write_data,
)
from mtl_export.graph.passes.own_tensors import own_names
from mtl_export.graph.passes.weights import is_common
from mtl_export.merge.writer import task_config


def write_graph(model: ir.Model, bound: BoundModel, folder: Path, task: Task | None) -> None:
    """Write a model of one part, ``model.onnx``; see ``write_graphs``."""
    write_graphs({"model": model}, bound, folder, task)


def write_graphs(
    models: Mapping[str, ir.Model],
    bound: BoundModel,
    folder: Path,
    task: Task | None,
    shared: SharedData | None = None,
) -> dict[str, WrittenFile]:
    """Write the parts of one model to the existing folder ``folder``.

    Args:
        models: By stem, what ``merged_graph`` or ``routed_graph`` returned for each part.
        bound: Where they came from.
        folder: Gets ``<stem>.onnx`` for each part, ``model.onnx.data`` for all of them,
            ``config.json`` and the base's tokenizer files.
        task: The task of a merged graph; None for the single graph, whose labels per task
            are in the ONNX metadata because ``config.json`` has no place for them.
        shared: For merged graphs of an export of several tasks: ``shared.onnx.data``, which
            then holds what all tasks have in common.

    Returns:
        Hash and size of the data files, by name.
    """
    own = own_names(bound)
    places, files = write_data(
        models, folder, shared, lambda name, tensor: name not in own and is_common(tensor)
    )
    with externalised(models, places):
        for stem, model in models.items():
            ir.save(model, folder / f"{stem}.onnx")
    config = dict(bound.base.config)
    if task is not None:
        config = task_config(bound, task, None)
    elif bound.adapters.model_class:
        config["architectures"] = [bound.adapters.model_class]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)
    pipeline = pipeline_beside(bound, embedding_of(next(iter(models.values()))))
    if pipeline is not None:
        pipeline.write(folder)
    return files


def embedding_of(model: ir.Model) -> SentenceEmbedding | None:
    """Return how a graph pools, None if it does not."""
    return SentenceEmbedding.from_json(model.metadata_props.get(METADATA_KEY, ""))


def pipeline_beside(bound: BoundModel, embedding: SentenceEmbedding | None) -> Pipeline | None:
    """Return the sentence-transformers pipeline that goes with a graph.

    Raises:
        UsageError: The graph pools otherwise than the base does.
    """
    is_text = any(file.name.startswith("tokenizer") for file in companion_files(bound.base))
    if embedding is None or not is_text:
        return bound.pipeline
    return pooled_pipeline(bound.pipeline, embedding, bound.base.config)
