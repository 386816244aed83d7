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
from mtl_export.merge.writer import task_config

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


def write_graph(model: ir.Model, bound: BoundModel, folder: Path, task: Task | None) -> None:
    """Write a model of one part, ``model.onnx``; see ``write_graphs``."""
    write_graphs({"model": model}, bound, folder, task)


def write_graphs(
    models: Mapping[str, ir.Model], bound: BoundModel, folder: Path, task: Task | None
) -> None:
    """Write the parts of one model to the existing folder ``folder``.

    Args:
        models: By stem, what ``merged_graph`` or ``routed_graph`` returned for each part.
        bound: Where they came from.
        folder: Gets ``<stem>.onnx`` and ``<stem>.onnx.data`` for each part, ``config.json``
            and the base's tokenizer files.
        task: The task of a merged graph; None for the single graph, whose labels per task
            are in the ONNX metadata because ``config.json`` has no place for them.
    """
    for stem, model in models.items():
        ir.save(model, folder / f"{stem}.onnx", external_data=f"{stem}.onnx.data")
    config = dict(bound.base.config)
    if task is not None:
        config = task_config(bound, task, None)
    elif bound.adapters.model_class:
        config["architectures"] = [bound.adapters.model_class]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)
