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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.checkpoint.checkpoint import Task, is_of_another_output
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, LinkedDataError, shortened
from mtl_export.names import TASK_IDS
from mtl_export.parity.cases import Case
from mtl_export.parity.outputs import Subject, answers
from mtl_export.parity.presets import LAYERS, NOTHING, ZEROED
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.task_batches import by_task

OTHERS = "tensors of other tasks"
# Parts of stacks that are nothing but adapters.
ADAPTERS = frozenset({"core", "downs", "ups"})
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
# What numpy and ONNX Runtime both know; a bfloat16 array cannot be handed over.
FED = {"float32", "float16"}


def weight_cells(
    cell: Cell,
    path: Path,
    reference: Reference,
    tasks: Sequence[Task],
    modules: Sequence[str],
    threads: int,
    *,
    left_out: Collection[str] = NOTHING,
    zeroed: Array | None = None,
    limit: float = 0.0,
) -> list[Cell]:
    """Return the cells that are not left out.

    Args:
        cell: Says whose they are; ``passed``.
        path: The ONNX file of a single graph.
        reference: The output that is looked at; every task has a row in its case.
        tasks: The checkpoint's tasks.
        modules: The layers that the checkpoint adapts.
        threads: As for ``OrtRunner``.
        left_out: Checks not to run.
        zeroed: What the base answers under the tasks' heads; None where that is not asked.
        limit: Largest error allowed against it.

    Raises:
        GraphError: The file is no single graph of these tasks.
    """
    names = [OTHERS, *([] if LAYERS in left_out else [LAYERS])]
    names += [] if zeroed is None else [ZEROED]
    try:
        probe = _Probe(path, len(tasks), threads)
    except (BackendMissingError, LinkedDataError, ValueError, OSError) as error:
        return [replace(cell, case=n, verdict="not-run", reason=str(error)) for n in names]
    if not probe.stacks:
        reason = "none of its tensors can be exchanged from outside"
        return [replace(cell, case=n, verdict="not-run", reason=reason) for n in names]
    case, subject = reference.case, reference.subject
    output = subject.output
    if output not in probe.outputs:
        reason = f"no output {output!r}"
        return [replace(cell, case=name, verdict="failed", reason=reason) for name in names]
    before = probe.answer(case.inputs, output, {})
    cells = [_verdict(replace(cell, case=OTHERS), _leaks(probe, case, output, tasks, before))]
    if LAYERS not in left_out:
        problems = _lost(probe, modules) + _idle(probe, case, subject, tasks, before)
        cells.append(_verdict(replace(cell, case=LAYERS), problems))
    if zeroed is not None:
        cells.append(_zeroed(replace(cell, case=ZEROED), probe, case, output, zeroed, limit))
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
        import onnx_ir as ir

        from mtl_export.graph.opened import open_graph
        from mtl_export.graph.stacks_on_disk import stacks_of
        from mtl_export.runtime.ort import load_onnxruntime

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


def _zeroed(cell: Cell, probe: _Probe, case: Case, output: str, base: Array, limit: float) -> Cell:
    """Return the cell that says whether the graph is the base where adapters are zero."""
    own = [name for name in probe.stacks if name.rpartition(".")[2] in ADAPTERS]
    found = probe.answer(case.inputs, output, {n: np.zeros_like(probe.stacks[n]) for n in own})
    every = np.ones(len(base), np.bool_)
    if found.shape != base.shape:
        return _verdict(cell, [f"{output} has shape {list(found.shape)}, not {list(base.shape)}"])
    right, left = answers(case, every, base), answers(case, every, found.astype(np.float64))
    finite = np.isfinite(right)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return _verdict(cell, [f"{output} is finite elsewhere than the base's"])
    error = float(np.nan_to_num(np.abs(left[finite] - right[finite]), nan=np.inf).max(initial=0.0))
    size = None if np.isinf(error) else error
    cell = replace(cell, max_abs_error=size, limit=limit)
    return (
        cell
        if error <= limit
        else _verdict(
            cell, [f"with adapters of zero it is {error:.3g} off the base; allowed {limit:.3g}"]
        )
    )


def _lost(probe: _Probe, modules: Sequence[str]) -> list[str]:
    there = set(probe.modules.values())
    return [f"{module} has no tensors of tasks" for module in modules if module not in there]


def _leaks(
    probe: _Probe, case: Case, output: str, tasks: Sequence[Task], before: Array
) -> list[str]:
    found = []
    for task in tasks:
        fed = {}
        for name, values in probe.stacks.items():
            fed[name] = values.copy()
            fed[name][probe.task_rows(name, task.index)] = np.nan
        after = probe.answer(case.inputs, output, fed)
        own = case.task_ids == task.index
        if not np.array_equal(after[~own], before[~own], equal_nan=True):
            found.append(f"{task.name}'s reach other tasks' rows")
        if not np.isnan(after[own]).reshape(int(own.sum()), -1).any(axis=1).all():
            found.append(f"{task.name}'s own rows do not use them")
    return found


def _idle(
    probe: _Probe, case: Case, subject: Subject, tasks: Sequence[Task], before: Array
) -> list[str]:
    found = []
    for module in dict.fromkeys(probe.modules.values()):
        if subject.tasks and is_of_another_output(module, subject.output):
            continue
        own = [name for name, owner in probe.modules.items() if owner == module]
        fed = {name: np.zeros_like(probe.stacks[name]) for name in own}
        after = probe.answer(case.inputs, subject.output, fed)
        for task in tasks:
            if not subject.serves(task):
                continue
            rows = case.task_ids == task.index
            holds = any(probe.stacks[n][probe.task_rows(n, task.index)].any() for n in own)
            if holds and np.array_equal(after[rows], before[rows], equal_nan=True):
                found.append(f"{module} does nothing for {task.name}")
    return found


def _verdict(cell: Cell, problems: list[str]) -> Cell:
    return replace(cell, verdict="failed", reason=shortened(problems)) if problems else cell
