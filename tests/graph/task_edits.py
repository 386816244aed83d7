"""A fourth task for the toy model's single graph, and what a graph answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.bundle.edited import Edited, edit_folder
from mtl_export.bundle.verify import verify_folder
from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.task_edit import add_task
from mtl_export.runtime.golden import Vector
from mtl_export.runtime.ort import OrtRunner
from tests.adapters import toys
from tests.factories import HIDDEN

WIDE = Task("intent", 3, ("a", "b", "c", "d", "e", "f"), "single_label_classification")
ATOL = 3e-5


def four_tasks(*, wide: bool = True) -> dict[str, Any]:
    """Return the toy checkpoint's parts with a fourth task; the first three are unchanged."""
    parts = toys.checkpoint_parts()
    generator = np.random.default_rng(9)
    labels = WIDE.labels if wide else WIDE.labels[:3]
    task = Task(WIDE.name, 3, labels, WIDE.kind)
    layers = {}
    for module, tensors in parts["layers"].items():
        own = {
            name: np.concatenate([tensors[name], tensors[name][:1] + generator.normal(size=1)])
            for name in ("lambda", "mixing")
        }
        layers[module] = tensors | {name: v.astype(np.float32) for name, v in own.items()}
    head = (
        generator.normal(size=(len(labels), HIDDEN)).astype(np.float32),
        generator.normal(size=len(labels)).astype(np.float32),
    )
    heads = {toys.HEAD: {**parts["heads"][toys.HEAD], task.name: head}}
    return parts | {"tasks": (*toys.TASKS, task), "layers": layers, "heads": heads}


def bound_of(folder: Path, parts: dict[str, Any], base: Path) -> BoundModel:
    """Return a checkpoint of these parts, bound to the toy base."""
    return toys.bound_model(base, toys.write_checkpoint(folder, parts, BaseReference()))


def golden(folder: Path, name: str, ids: list[int]) -> Vector:
    """Return what the graph answers now."""
    inputs = {**toys.token_rows(len(ids), 6), "task_ids": np.array(ids)}
    return Vector(name, "model.onnx", inputs, {"logits": run(folder, inputs)}, 0.0, 0.0)


def run(folder: Path, inputs: dict[str, Array], file: str = "model.onnx") -> Array:
    """Return the logits."""
    with OrtRunner(folder / file, threads=1) as runner:
        logits: Array = runner.infer(inputs)["logits"]
    return logits


def rows(ids: Sequence[int]) -> dict[str, Array]:
    """Return inputs of these tasks; the text of row i is the same whatever the ids are."""
    return {**toys.token_rows(len(ids), 9), "task_ids": np.array(ids)}


def add(folder: Path, adapters: AdapterSet, name: str = WIDE.name) -> Edited:
    """Add the fourth task."""
    return edit_folder(
        folder, lambda models: add_task(models, adapters, adapters.tasks[3], name), "add",
        added=name,
    )  # fmt: skip


def assert_whole(folder: Path) -> None:
    """Fail unless files and golden vectors are as the manifest says."""
    checks = verify_folder(folder, threads=1)
    assert {check.verdict for check in checks} == {"passed"}, checks
