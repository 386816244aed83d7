"""What every layer that tasks change is given and makes, in the oracle and in a candidate.

    PyTorch   forward hooks on the modules
    ONNX      the values of ``graph.taps`` as more outputs of a copy in memory

B rows, I inputs and O outputs of a layer. Where a candidate runs one task at a time, so do these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mtl_export.adapters.modules.model import MultiTaskModel
from mtl_export.adapters.modules.naming import own_module
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.names import TASK_IDS
from mtl_export.runtime.ort import task_table
from mtl_export.runtime.runners.base import Runner

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class Activation:
    """One layer in one forward pass.

    Attributes:
        given: ``[B, ..., I]``, float64; token ids of an embedding, int64.
        result: ``[B, ..., O]``, float64.
        is_quantised: What it was given is rounded to few bits inside.
    """

    given: Array
    result: Array
    is_quantised: bool = False


Activations = dict[str, Activation]


class OracleLayers:
    """The oracle in one dtype, layer by layer.

    Args:
        runner: An oracle's runner, open.
        modules: The layers that are looked at.
    """

    def __init__(self, runner: Runner, modules: Sequence[str]) -> None:
        models: tuple[MultiTaskModel, ...] = getattr(runner, "models", ())
        if not models:
            raise GraphError(
                f"{runner.name}: no PyTorch model",
                expected="an oracle whose layers can be looked into",
            )
        self._runner, self._models = runner, models
        self._layers = [
            {name: _module(one.model, name) for name in modules if _has(one.model, name)}
            for one in models
        ]

    def activations(self, inputs: Mapping[str, Array], task_index: int) -> Activations:
        """Return every layer's activation for rows of one task, in the order they run."""
        layers = self._layers[self._member(task_index)]
        with captured(layers) as found:
            self._runner.infer(inputs)
        return found

    def result(self, module: str, task_index: int, given: Array) -> Array:
        """Return what the layer makes of ``given`` under the task."""
        member = self._member(task_index)
        layer = self._layers[member][module]
        own_id = 0 if len(self._models) > 1 else task_index
        x = torch.from_numpy(np.ascontiguousarray(given))
        if x.is_floating_point():
            x = x.to(next(self._models[member].parameters()).dtype)
        with torch.inference_mode():
            self._models[member].routing.set(torch.tensor([own_id]))
            return _array(layer(x))

    def _member(self, task_index: int) -> int:
        return task_index if len(self._models) > 1 else 0


@contextmanager
def captured(layers: Mapping[str, nn.Module]) -> Iterator[Activations]:
    """Record what each module is given and makes in the forward pass inside the block.

    One that runs several times is left out.
    """
    found: Activations = {}
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
            x = args[0] if args else next(iter(named.values()))
            if name in seen:
                found.pop(name, None)
            else:
                found[name] = Activation(_array(x), _array(y))
            seen.add(name)

        return record

    handles = [
        layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def merged_activations(
    runner: Runner, inputs: Mapping[str, Array], modules: Sequence[str]
) -> Activations:
    """Return the activations of a merged folder's runner, open, for rows of its task.

    Raises:
        GraphError: It holds no PyTorch model.
    """
    models: tuple[nn.Module, ...] = getattr(runner, "models", ())
    if not models:
        raise GraphError(f"{runner.name}: no PyTorch model", expected="a merged folder, open")
    model = models[0]
    layers = {name: _module(model, name) for name in modules if _has(model, name)}
    with captured(layers) as found:
        runner.infer(inputs)
    return found


class GraphLayers:
    """An ONNX graph whose layers' values are outputs too; nothing is written.

    Args:
        path: The file, its external data beside it; adapter files too where it takes them.
        modules: The layers that are looked at.
        threads: As for ``OrtRunner``.

    Raises:
        GraphError: None of the layers is there under its name.
        BackendMissingError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, modules: Sequence[str], threads: int = 0) -> None:

        from mtl_export.graph.opened import open_graph
        from mtl_export.graph.taps import layer_taps, with_outputs

        model = open_graph(path)
        self.taps = layer_taps(model, modules)
        if not self.taps:
            raise GraphError(
                f"{path}: no node of any adapted layer",
                expected=(
                    "nodes called <module>/<step>, as they were exported, because layers are "
                    "found by these names"
                ),
                fix="Compare a graph whose nodes nobody renamed",
            )
        with_outputs(model, self.taps)
        self._path = path
        self._tasks = task_table(model.metadata_props)
        self._session = graph_session(model, path, threads)
        names = {value.name for value in self._session.get_inputs()}
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self.takes_one_task = shapes.get(TASK_IDS) == [1]
        self._takes_adapters = any(path.parent.glob("*.onnx_adapter")) and TASK_IDS not in names

    @property
    def runs_by_task(self) -> bool:
        """Return whether a batch must be of one task."""
        return self.takes_one_task or self._takes_adapters

    def activations(self, inputs: Mapping[str, Array]) -> Activations:
        """Return every layer's activation, in the order they run.

        Raises:
            EngineRunError: The graph does not take the inputs, or a node failed.
        """
        from mtl_export.runtime.ort import run_session

        names = sorted({name for tap in self.taps for name in (tap.given, tap.result)})
        there = {value.name for value in self._session.get_outputs()}
        given, options = self._fed(inputs)
        values = run_session(
            self._session, self._path, given, [name for name in names if name in there], options
        )
        values = {**inputs, **values}
        return {
            tap.module: Activation(
                _wide(values[tap.given]), _wide(values[tap.result]), tap.is_quantised
            )
            for tap in self.taps
        }

    def _fed(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Any]:
        """Return what the session is given, and the run options."""
        if self.takes_one_task:
            return {**inputs, TASK_IDS: inputs[TASK_IDS][:1]}, None
        if not self._takes_adapters:
            return dict(inputs), None
        from mtl_export.runtime.onnx_adapters import active, adapter_file

        task = int(inputs[TASK_IDS][0])
        name = next(one.name for one in self._tasks if one.index == task)
        self._adapter = active(self._path.with_name(adapter_file(self._path.stem, name)))
        rest = {name: value for name, value in inputs.items() if name != TASK_IDS}
        return rest, self._adapter.options


def graph_session(model: Any, path: Path, threads: int) -> Any:
    """Return an ONNX Runtime session on a changed copy of the graph at ``path``.

    Raises:
        BackendMissingError: onnxruntime is not installed.
        GraphError: It refuses the copy.
    """
    import onnx_ir as ir

    from mtl_export.runtime.ort import CPU, load_onnxruntime

    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
    try:
        graph = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=[CPU])
    except Exception as error:  # its exception types are made by pybind and share no base
        raise GraphError(
            f"{path}: onnxruntime refuses the copy that shows its layers ({error})",
            expected="a graph that still opens with more outputs",
        ) from error


def _module(model: Any, name: str) -> nn.Module:
    module: nn.Module = model.get_submodule(own_module(model, name))
    return module


def _has(model: Any, name: str) -> bool:
    from mtl_export.errors import BaseModelError

    try:
        own_module(model, name)
    except BaseModelError:
        return False
    return True


def _array(value: torch.Tensor) -> Array:
    wide = value.detach().to(torch.float64) if value.is_floating_point() else value.detach()
    return np.asarray(wide.numpy().copy())


def _wide(value: Array) -> Array:
    return value.astype(np.float64) if value.dtype.kind == "f" else value
