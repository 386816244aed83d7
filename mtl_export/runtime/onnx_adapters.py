"""Adapter files of ONNX Runtime, and a graph that takes them as input.

    <task>.onnx_adapter           parameters of one task by the names of the graph's inputs
    <stem>.<task>.onnx_adapter    the same where a model runs as several graphs

ONNX Runtime takes one adapter for a run: ``LoraAdapter.Load``, then
``RunOptions.add_active_adapter``. A batch of several tasks is therefore several runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.errors import EngineRunError
from mtl_export.names import TASK_IDS
from mtl_export.runtime.ort import OrtRunner, load_onnxruntime, run_session, task_table
from mtl_export.runtime.runners.task_batches import by_task

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

# Both are the user's to count; ONNX Runtime does not look at them.
ADAPTER_VERSION = MODEL_VERSION = 1


def adapter_file(stem: str, task: str) -> str:
    """Return the name of a task's file."""
    return f"{task}.onnx_adapter" if stem == "model" else f"{stem}.{task}.onnx_adapter"


def write_adapter(path: Path, parameters: Mapping[str, Array]) -> None:
    """Write one task's parameters, in name order.

    Raises:
        BackendMissingError: onnxruntime is not installed; it alone knows the format.
    """
    onnxruntime = load_onnxruntime()
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(MODEL_VERSION)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        for name, value in sorted(parameters.items())
    }
    adapter.set_parameters(values)
    adapter.export_adapter(str(path.absolute()))


@dataclass(frozen=True)
class ActiveAdapter:
    """One task, ready to be run.

    Attributes:
        options: ``onnxruntime.RunOptions`` under which it is active.
        adapter: ``onnxruntime.LoraAdapter``. The options only point at it: whoever runs
            under them must keep it, or the run reads freed memory.
    """

    options: Any
    adapter: Any


def active(path: Path) -> ActiveAdapter:
    """Return the adapter at ``path``, loaded and active.

    Raises:
        BackendMissingError: onnxruntime is not installed.
        EngineRunError: It does not take the file.
    """
    onnxruntime = load_onnxruntime()
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    try:
        if not path.is_file():  # the library waits for a pipe's writer for ever
            raise FileNotFoundError("no such file")
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
    except Exception as error:  # its exception types are made by pybind and share no base
        raise EngineRunError(
            f"{path}: onnxruntime cannot load it ({str(error).strip().splitlines()[0]})",
            expected="an adapter that mtl-export onnx --layout adapter-input wrote",
            fix="Export it again with --force",
        ) from error
    return ActiveAdapter(options, adapter)


class AdapterRunner(OrtRunner):
    """A graph that takes adapters, as if it were the single graph: it takes ``task_ids``.

    Rows of one task are run together, under its adapter. Rows of an unknown id are NaN, as
    the single graph's are.

    Args:
        path: ``model.onnx``, the adapters beside it.
        threads: Threads inside one operator; 0 lets ONNX Runtime decide.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        super().__init__(path, threads=threads)
        self._adapters: dict[int, ActiveAdapter] = {}

    def __enter__(self) -> AdapterRunner:
        """Open the session and every task's adapter."""
        super().__enter__()
        for task in task_table(self.metadata):
            path = self._path.with_name(adapter_file(self._path.stem, task.name))
            self._adapters[task.index] = active(path)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session."""
        self._adapters.clear()
        super().__exit__()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs that a caller gives."""
        return (*super().inputs, TASK_IDS)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, floating ones as float64.

        Raises:
            EngineRunError: An input is missing, unknown or misshaped, or a node failed.
        """
        return by_task(inputs, self._one)

    def _one(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for rows of one task, ``task_ids`` [1]."""
        task = int(inputs[TASK_IDS][0])
        given = {name: value for name, value in inputs.items() if name != TASK_IDS}
        # An unknown task is run under any adapter, for the outputs' shapes.
        adapter = self._adapters.get(task) or next(iter(self._adapters.values()))
        found = run_session(self._session, self._path, given, options=adapter.options)
        wide = {name: value.astype(np.float64) for name, value in found.items()}
        if task not in self._adapters:
            wide = {name: np.full(value.shape, np.nan) for name, value in wide.items()}
        return wide
