"""What the tensors of a single graph do: each task's own work for it alone, and all do work.

    tensors of other tasks   filled with NaN, they leave a task's rows as they are, bit for bit,
                             and poison their own
    zeroed adapters          all tasks' adapters set to zero, it is the base under their heads
    every layer counts       without one layer's tensors the answers of every task change whose
                             tensors there are not zero

All look at the file, not at its numbers: a graph that routes the traced ids, or lost a layer
on the way, may agree with the oracle wherever it was compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mtl_export.checkpoint.checkpoint import is_of_another_output
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, LinkedDataError
from mtl_export.graph.opened import open_graph
from mtl_export.graph.stacks_on_disk import stacks_of
from mtl_export.names import MODEL_FILE, PREFILL_FILE, TASK_IDS
from mtl_export.parity.cases import LAYERS, ZEROED
from mtl_export.parity.judged import Judged
from mtl_export.parity.outputs import largest_error
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell
from mtl_export.runtime.ort import load_onnxruntime
from mtl_export.runtime.runners.task_batches import by_task

OTHERS = "tensors of other tasks"
# Graphs that see every adapted layer and answer by themselves.
PROBED = frozenset({MODEL_FILE, PREFILL_FILE})
# Parts of stacks that are nothing but adapters.
ADAPTERS = frozenset({"core", "downs", "ups"})
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
# What numpy and ONNX Runtime both know; a bfloat16 array cannot be handed over.
FED = {"float32", "float16"}


def weight_cells(judged: Judged) -> list[Cell]:
    """Return the cells that are not left out; none of what is no single graph's ``PROBED`` file.

    Raises:
        GraphError: The file is no single graph of these tasks.
    """
    path, one, extra = judged.artefact.graph, judged.widest, judged.extra
    if path is None or path.name not in PROBED or not judged.artefact.serves_all:
        return []
    cell, output = judged.artefact.cell(), one.subject.output
    names = [OTHERS, *([] if LAYERS in extra.left_out else [LAYERS])]
    names += [ZEROED] if output in extra.zeroed else []
    try:
        probe = _Probe(path, len(judged.tasks), judged.threads)
    except (BackendMissingError, LinkedDataError, ValueError, OSError) as error:
        return [cell.not_run(name, str(error)) for name in names]
    if not probe.stacks:
        reason = "none of its tensors can be exchanged from outside"
        return [cell.not_run(name, reason) for name in names]
    if output not in probe.outputs:
        return [cell.judged(name, f"no output {output!r}") for name in names]
    before = probe.answer(one.case.inputs, output, {})
    cells = [cell.judged(OTHERS, *_leaks(probe, judged, before))]
    if LAYERS in names:
        cells.append(cell.judged(LAYERS, *_lost(probe, judged), *_idle(probe, judged, before)))
    if ZEROED in names:
        cells.append(_zeroed(cell, probe, one, extra.zeroed[output], judged.limit(one)))
    return cells


class _Probe:
    """The graph, its per-task tensors exchangeable at every call.

    Attributes:
        stacks: By name, the stored values, ``[(T + 1) block, ...]``.
        blocks: Rows of each that are one task's.
        modules: Whose each is.
        outputs: What the graph gives.
    """

    def __init__(self, path: Path, task_count: int, threads: int) -> None:
        onnxruntime = load_onnxruntime()
        model = open_graph(path)
        self.stacks: dict[str, Array] = {}
        self.blocks: dict[str, int] = {}
        self.modules: dict[str, str] = {}
        for stack in stacks_of(model, task_count):
            values = stack.tensor.numpy()
            name = stack.value.name or ""
            if values.dtype.name in FED and stack.part != "table":
                # An initializer that is an input as well is only the default.
                model.graph.inputs.append(stack.value)
                self.stacks[name], self.blocks[name] = values, stack.block
                self.modules[name] = stack.module
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
        graph = ir.to_proto(model).SerializeToString()
        self._session: Any = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def answer(self, inputs: Mapping[str, Array], output: str, fed: Mapping[str, Array]) -> Array:
        """Return ``output``, with the stacks in ``fed`` in place of the stored ones."""

        def infer(own: Mapping[str, Array]) -> dict[str, Array]:
            return {output: self._session.run([output], {**own, **fed})[0]}

        takes_one_task = any(
            value.name == TASK_IDS and value.shape == [1] for value in self._session.get_inputs()
        )
        return (by_task(inputs, infer) if takes_one_task else infer(inputs))[output]

    def task_rows(self, name: str, task_index: int) -> slice:
        """Return which rows of a stack are the task's."""
        block = self.blocks[name]
        return slice(task_index * block, (task_index + 1) * block)


def _zeroed(cell: Cell, probe: _Probe, one: Reference, base: Array, limit: float) -> Cell:
    """Return the cell that says whether the graph is the base where adapters are zero."""
    output = one.subject.output
    own = [name for name in probe.stacks if name.rpartition(".")[2] in ADAPTERS]
    zeros = {name: np.zeros_like(probe.stacks[name]) for name in own}
    found = probe.answer(one.case.inputs, output, zeros)
    if found.shape != base.shape:
        reason = f"{output} has shape {list(found.shape)}, not {list(base.shape)}"
        return cell.judged(ZEROED, reason)
    error = largest_error(one.case, base, found)
    size = f"{error:.3g} off" if np.isfinite(error) else "finite elsewhere than"
    reason = "" if error <= limit else (
        f"with adapters of zero {output} is {size} the base's; allowed {limit:.3g}"
    )  # fmt: skip
    known = error if np.isfinite(error) else None
    return replace(cell.judged(ZEROED, reason), max_abs_error=known, limit=limit)


def _lost(probe: _Probe, judged: Judged) -> list[str]:
    """Return the layers that some task adapts and the graph has no tensors for."""
    there = set(probe.modules.values())
    return [
        f"{name} has no tensors of tasks"
        for name, layer in judged.bound.adapters.layers.items()
        if name not in there and any(layer.factors(t.index) is not None for t in judged.tasks)
    ]


def _leaks(probe: _Probe, judged: Judged, before: Array) -> list[str]:
    """Return whose tensors reach other tasks' rows, or not even their own."""
    one, found = judged.widest, []
    for task in judged.tasks:
        fed = {}
        for name, values in probe.stacks.items():
            fed[name] = values.copy()
            fed[name][probe.task_rows(name, task.index)] = np.nan
        after = probe.answer(one.case.inputs, one.subject.output, fed)
        own = one.case.task_ids == task.index
        if not np.array_equal(after[~own], before[~own], equal_nan=True):
            found.append(f"{task.name}'s reach other tasks' rows")
        if not np.isnan(after[own]).reshape(int(own.sum()), -1).any(axis=1).all():
            found.append(f"{task.name}'s own rows do not use them")
    return found


def _idle(probe: _Probe, judged: Judged, before: Array) -> list[str]:
    """Return the layers whose tensors, not zero for a task, do not change its answers."""
    one, found = judged.widest, []
    case, subject = one.case, one.subject
    for module in dict.fromkeys(probe.modules.values()):
        if subject.tasks and is_of_another_output(module, subject.output):
            continue
        own = [name for name, owner in probe.modules.items() if owner == module]
        fed = {name: np.zeros_like(probe.stacks[name]) for name in own}
        after = probe.answer(case.inputs, subject.output, fed)
        for task in filter(subject.serves, judged.tasks):
            rows = case.task_ids == task.index
            holds = any(probe.stacks[n][probe.task_rows(n, task.index)].any() for n in own)
            if holds and np.array_equal(after[rows], before[rows], equal_nan=True):
                found.append(f"{module} does nothing for {task.name}")
    return found
