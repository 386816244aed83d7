"""Write a lowered graph as a folder: graph, external data, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import companion_files
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.merge.writer import task_config

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"


def write_graph(model: ir.Model, bound: BoundModel, folder: Path, task: Task | None) -> None:
    """Write ``model`` to the existing folder ``folder``.

    Args:
        model: What ``merged_graph`` or ``routed_graph`` returned.
        bound: Where it came from.
        folder: Gets ``model.onnx``, ``model.onnx.data``, ``config.json`` and the base's
            tokenizer files.
        task: The task of a merged graph; None for the single graph, whose labels per task
            are in the ONNX metadata because ``config.json`` has no place for them.
    """
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE)
    config = dict(bound.base.config)
    if task is not None:
        config = task_config(bound, task, None)
    elif bound.adapters.model_class:
        config["architectures"] = [bound.adapters.model_class]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)
