"""Faults of quantised graphs: ranges that belong to somebody else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from tests.benchmarks.gate.fault import Fault
from tests.benchmarks.gate.models import CLASSIFIERS, ENCODER, write_model
from tests.benchmarks.gate.project import PER_TASK, Project, edit_graph, set_values
from tests.benchmarks.gate.weights import put
from tests.factories import WORDS

MERGED_INT8 = "per-task int8"
FOLDER = "onnx-int8"


def write_quantised(folder: Path) -> Project:
    """Return a project whose tasks' graphs are quantised to INT8."""
    project = Project(write_model(ENCODER, folder), ENCODER.name)
    project.export(PER_TASK)
    words = [word for word in WORDS if word.isalpha()]
    lines = [
        {"task": task.name, "text": f"{word} {words[(place + 3) % len(words)]} night"}
        for task in CLASSIFIERS
        for place, word in enumerate(words)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words_ = ("calibrate", "--layout", "per-task", "--data", str(folder / "rows.jsonl"))
    result = project.run(*words_, "--max-drop", "100", "--threads", "1", "--method", "max")
    assert result.exit_code == 0, result.output
    # Its labels are decided by signs: of random weights too many change for the gate to pass.
    shutil.rmtree(project.out / FOLDER / "topic")
    return project


def scales_of(model: ir.Model) -> dict[str, Array]:
    """Return the scales of activations, by name."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[1] is not None:
            value = node.inputs[1]
            if value.const_value is not None and node.inputs[0] is not None:
                found[str(value.name)] = value.const_value.numpy().copy()
    return found


def other_scales(project: Project) -> None:
    """A task's graph has the scales of another task's."""
    parent = project.out / FOLDER
    others = scales_of(ir.load(parent / "spam" / "model.onnx"))

    def change(model: ir.Model) -> None:
        own = scales_of(model)
        known = [name for name in own if name in others and np.shape(own[name]) == ()]
        assert known, (sorted(own), sorted(others))
        for name in known:
            set_values(model, name, put(others[name]))

    edit_graph(parent / "ads_rel" / "model.onnx", change)


FAULTS = (
    Fault("Q/DQ scales of another task", "quantised", MERGED_INT8, other_scales,
          "task ads_rel, quantised.*noise of quantising"),
)  # fmt: skip
