"""Does a task's output depend on other tasks' tensors? The file itself is asked.

In the modes matrix and matrixv2 it must not; in mode addition the shared stream is the norm of a
sum over all tasks, so it must. ONNX Runtime is given other tasks' slices as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.edit import STACKED
from mtl_export.dense.model import DenseModel
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.report import Cell, Verdict
from mtl_export.runtime.ort import load_onnxruntime

CASE = "isolation"


def isolation_cells(
    model: DenseModel, artefact: Artefact, inputs: Mapping[str, Array]
) -> list[Cell]:
    """Return a cell for each task of a single graph; none of other artefacts."""
    path = artefact.path
    if path is None or path.suffix != ".onnx" or artefact.task is not None:
        return []
    stacks = stacked(path)
    cells = []
    is_apart = model.described.mode != "addition"
    before = _run(path, {}, inputs) if stacks else {}
    tasks = artefact.edited.tasks if artefact.edited and is_apart else model.tasks
    for place, task in enumerate(tasks):
        if not stacks:
            break  # no layer has task terms: all tasks share every feature
        if task.name not in before:
            continue
        zeroed = {name: _alone(values, place) for name, values in stacks.items()}
        after = _run(path, zeroed, inputs)[task.name]
        is_same = bool(np.array_equal(before[task.name], after))
        reason = ""
        if is_apart and not is_same:
            reason = "its output changes with other tasks' tensors"
        if not is_apart and is_same:
            reason = (
                "its output does not change with other tasks' tensors, which mode addition sums"
            )
        verdict: Verdict = "failed" if reason else "passed"
        cells.append(Cell(artefact.name, artefact.runner.name, task.name, CASE, verdict, reason))
    return cells


def stacked(path: Path) -> dict[str, Array]:
    """Return the tensors of a graph that have a slice for each task, by name."""
    graph = ir.load(path).graph
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.endswith(STACKED) and value.const_value is not None
    }


def _alone(values: Array, place: int) -> Array:
    own = np.zeros_like(values)
    own[place] = values[place]
    return own


def _run(path: Path, instead: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return a graph's outputs with some of its tensors replaced."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    values: dict[str, Any] = {}
    for name, value in instead.items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        options.add_initializer(name, values[name])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
