"""transformers models: the base to trace or adapt, the oracle, and a merged folder.

The oracle is the unmerged model with the paper's own forward pass in every adapted
layer (``mtl_export.adapters.modules``); it knows nothing of the normal form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.family import family_named, read_adapters
from mtl_export.adapters.modules.base import (
    base_model,
    class_named,
    load_with_info,
    quiet_transformers,
)
from mtl_export.adapters.modules.model import MultiTaskModel
from mtl_export.adapters.modules.naming import own_module
from mtl_export.adapters.modules.readout import with_readouts
from mtl_export.adapters.normal_form import NO_LABEL
from mtl_export.checkpoint.checkpoint import HeadTensors, Task
from mtl_export.checkpoint.config_limits import check_config
from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.checkpoint.model_inputs import CONFIG
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, EngineRunError, MtlExportError, shortened
from mtl_export.merge.head_file import HEAD_FILE, read_readout
from mtl_export.names import LOGITS
from mtl_export.runtime.saturating_casts import SaturatingCasts

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def use_threads(count: int) -> None:
    """Let PyTorch use ``count`` threads; 0 leaves its own choice."""
    if count:
        torch.set_num_threads(count)


class OracleRunner:
    """The reference: PyTorch, unmerged, in any floating dtype.

    Args:
        bound: The checkpoint and its base.
        dtype: ``fp64`` for the reference, the candidate's dtype for the noise floor.
    """

    def __init__(self, bound: BoundModel, dtype: str) -> None:
        self.name = f"oracle {dtype}"
        self._bound = bound
        self._dtype = TORCH_DTYPES[dtype]
        self._models: tuple[MultiTaskModel, ...] = ()
        self._called: set[str] = set()

    def __enter__(self) -> Self:
        """Load the base and adapt it: once, or once per task where each has its own adapter."""
        members = member_models(self._bound) or (self._bound,)
        self._models = tuple(oracle_model(member, self._dtype) for member in members)
        for model in self._models:
            without_cache(model.model)
            for name in model.adapter_modules:
                layer = model.model.get_submodule(own_module(model.model, name))
                layer.register_forward_pre_hook(lambda *_, name=name: self._called.add(name))
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the model."""
        self._models = ()

    @property
    def models(self) -> tuple[MultiTaskModel, ...]:
        """Return what was loaded: one model, or one per task; none outside the block."""
        return self._models

    @property
    def uncalled(self) -> list[str]:
        """Return the adapted layers that no row has reached yet, but experts: they are chosen."""
        adapted = {name for model in self._models for name in model.adapter_modules}
        return sorted(name for name in adapted - self._called if ".experts." not in name)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for ``inputs``, which hold ``task_ids``.

        Raises:
            EngineRunError: A task id is outside [0, T).
            BaseModelError: The model cannot compute these inputs.
        """
        if not self._models:
            raise RuntimeError("enter the runner before calling infer")
        tasks, ids = self._bound.adapters.tasks, inputs["task_ids"]
        count = len(tasks)
        if ids.min() < 0 or ids.max() >= count:
            raise EngineRunError(
                f"task_ids: {sorted(set(ids.tolist()))}",
                expected=f"ids from 0 to {count - 1}, because the checkpoint has {count} tasks",
            )
        with torch.inference_mode(), SaturatingCasts():
            tensors = _tensors(inputs, self._dtype)
            present = np.unique(ids)
            if len(self._models) == 1 and len(present) == 1:
                outputs = computed(self._models[0], tensors)
                return _answering(outputs, tasks[int(present[0])])
            # One task at a time: layers that see windows or packed or transposed tokens would
            # have to know whose rows they are, and that is what the graphs are checked for.
            return _joined(_members(self._models, present), tensors, tasks)

    def _generated_by_task(
        self, task_ids: Array, width: int, generate: Callable[[Any, Array], Array]
    ) -> Array:
        """Return the tokens ``[B, width]``, where every task may have a model of its own.

        Args:
            task_ids: int64 [B].
            width: Tokens a row.
            generate: From a model whose routing is set, and the rows [B] it is to answer,
                to their tokens.
        """
        tokens = np.zeros((len(task_ids), width), np.int64)
        has_own = len(self._models) > 1
        for index, model in enumerate(self._models):
            rows = task_ids == index if has_own else np.ones(len(task_ids), np.bool_)
            if rows.any():
                ids = np.zeros_like(task_ids[rows]) if has_own else task_ids
                model.routing.set(torch.from_numpy(ids))
                tokens[rows] = generate(model.model, rows)
        return tokens


class MergedRunner:
    """A merged folder, loaded the way its user will: by ``from_pretrained``.

    Args:
        folder: What ``mtl-export merge`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.name = "merged pytorch"
        self._folder = folder
        self._model: nn.Module | None = None

    def __enter__(self) -> Self:
        """Load the folder.

        Raises:
            BaseModelError: A weight is missing in the folder or has another shape.
        """
        try:
            return self._entered()
        except MtlExportError:
            raise
        except Exception as error:
            # transformers, safetensors and json each raise their own on a broken file.
            raise BaseModelError(
                f"{self._folder}: transformers cannot load it ({error})",
                expected="a whole model folder",
                fix="Merge again with --force",
            ) from error

    def _entered(self) -> Self:
        import transformers

        with quiet_transformers():
            file = self._folder / "config.json"
            check_config(read_json(file, CONFIG, error=BaseModelError), 10_000, where=str(file))
            config = transformers.AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
            model_class = class_named(config.architectures[0])
            head_file = self._folder / HEAD_FILE
            if head_file.is_file():
                readout, shapes = read_readout(head_file)
                model_class = with_readouts(model_class, [readout], shapes)
            # Mismatched weights are let through only to be refused below, all at once.
            self._model, info = load_with_info(
                model_class, self._folder, ignore_mismatched_sizes=True
            )
        beside = _load_head(self._model, head_file) if head_file.is_file() else set()
        problems = [f"missing {key!r}" for key in sorted(info["missing_keys"] - beside)]
        mismatched = sorted(entry[0] for entry in info["mismatched_keys"])
        problems += [f"mismatched {key!r}" for key in mismatched]
        if problems:
            raise BaseModelError(
                f"{self._folder}: {shortened(problems)}",
                expected=(
                    f"every weight of {model_class.__name__}, because transformers would fill the "
                    "gap with random numbers"
                ),
                fix="Merge again with --force",
            )
        without_cache(self._model.eval())
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the model."""
        self._model = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Return what was loaded; nothing outside the block."""
        return () if self._model is None else (self._model,)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for ``inputs``; a merged model takes no ``task_ids``.

        Raises:
            BaseModelError: The model cannot compute them.
        """
        if self._model is None:
            raise RuntimeError("enter the runner before calling infer")
        with torch.inference_mode():
            dtype = next(self._model.parameters()).dtype
            tensors = _tensors({n: v for n, v in inputs.items() if n != "task_ids"}, dtype)
            return computed(self._model, tensors)


def _load_head(model: nn.Module, file: Path) -> set[str]:
    """Fill in the head that lies beside the model; return the names of its parameters."""
    tensors = open_safetensors(file).tensors
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(torch.from_numpy(tensor.widened()))
    return set(tensors)


def member_models(bound: BoundModel) -> tuple[BoundModel, ...]:
    """Return one bound model per task where each task has an adapter of its own, else none."""
    return tuple(
        BoundModel(
            member,
            replace(read_adapters(member, bound.base), model_class=bound.adapters.model_class),
            bound.base,
            bound.prefix,
        )
        for member in bound.checkpoint.members
    )


def _members(
    models: tuple[MultiTaskModel, ...], present: Array
) -> dict[int, tuple[MultiTaskModel, int]]:
    """Return, for each task in the batch, its model and its id there."""
    if len(models) == 1:
        return {task: (models[0], task) for task in present.tolist()}
    return {task: (models[task], 0) for task in present.tolist()}


def _answering(outputs: dict[str, Array], task: Task) -> dict[str, Array]:
    """Return those of ``outputs`` that are an answer of ``task``."""
    return {task.output: outputs[task.output]} if task.output else outputs


def _joined(
    members: Mapping[int, tuple[MultiTaskModel, int]],
    inputs: dict[str, torch.Tensor],
    tasks: Sequence[Task],
) -> dict[str, Array]:
    """Return the rows of every model's own task, put back in order.

    Outputs are as wide as the widest head of any task; labels a task does not have, and rows
    of an output that is not their task's, are -inf.
    """
    task_ids = inputs["task_ids"]
    parts: dict[str, list[tuple[Array, Array]]] = {}
    for task, (model, own_id) in members.items():
        rows = (task_ids == task).nonzero().squeeze(-1)
        own = {name: value[rows] for name, value in inputs.items()}
        own["task_ids"] = torch.full_like(rows, own_id)
        for name, value in _answering(computed(model, own), tasks[task]).items():
            if value.ndim and len(value) == len(rows):  # what is no row's answer cannot be put back
                parts.setdefault(name, []).append((rows.numpy(), value))
    joined = {}
    for name, found in parts.items():
        owners = {name, ""} if name == LOGITS else {name}
        widths = [len(task.labels) for task in tasks if task.output in owners]
        if found[0][1].ndim > 3:  # labels stand before height and width
            widths = []
        width = max([*widths, *(value.shape[-1] for _, value in found)])
        shape = (len(task_ids), *found[0][1].shape[1:-1], width)
        joined[name] = np.full(shape, NO_LABEL)
        for rows_of_task, value in found:
            joined[name][rows_of_task, ..., : value.shape[-1]] = value
    return joined


def oracle_model(bound: BoundModel, dtype: torch.dtype) -> MultiTaskModel:
    """Return the unmerged model of ``bound`` with every layer as the paper writes it."""
    module_name, _, class_name = family_named(bound.checkpoint.family).oracle.partition(":")
    adapted = getattr(import_module(module_name), class_name)
    model = base_model(bound, dtype)
    return MultiTaskModel(
        model,
        adapters={
            module: partial(adapted.from_tensors, layer=layer)
            for module, layer in bound.checkpoint.layers.items()
        },
        heads={
            module: [None if head is None else _head_module(head, dtype) for head in heads]
            for module, heads in bound.checkpoint.heads.items()
        },
    ).eval()


def _head_module(head: HeadTensors, dtype: torch.dtype) -> nn.Linear:
    weight = torch.from_numpy(head.weight.widened())
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if head.bias is None:
            linear.bias.zero_()
        else:
            linear.bias.copy_(torch.from_numpy(head.bias.widened()))
    return linear


def _tensors(inputs: Mapping[str, Array], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the inputs with images and other features in the model's dtype."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def without_cache(model: Any) -> None:
    """Let the model hand on no keys, values or states: nobody here asks for them."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):
            config.use_cache = False


def computed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """Return what ``model`` answers, by name.

    Raises:
        BaseModelError: It cannot compute these inputs.
    """
    with errors_of_model(model, tensors):
        return _arrays(model(**tensors))


@contextmanager
def errors_of_model(model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever the forward pass of a transformers model raises into one clear error.

    Raises:
        BaseModelError: The block raised.
    """
    try:
        yield
    except (MtlExportError, MemoryError, OSError):
        raise
    except Exception as error:  # each model raises its own
        own = getattr(model, "model", model) if isinstance(model, MultiTaskModel) else model
        taken = [name for name in inspect.signature(own.forward).parameters if name != "kwargs"]
        lines = str(error).splitlines() or [""]
        given = [f"{name} {list(value.shape)}" for name, value in inputs.items()]
        raise BaseModelError(
            f"{type(own).__name__}: it cannot compute {shortened(given)} ({type(error).__name__}: "
            f"{lines[0]})",
            expected=f"what its forward pass takes ({shortened(taken)})",
            fix="Set pad_token_id in config.json of the base"
            if "padding token" in lines[0]
            else "Pass rows that it takes to parity: --inputs arrays.npz, with each of them by"
            " name, [N, ...], and task_ids [N]",
        ) from error


def _arrays(output: Any) -> dict[str, Array]:
    return {
        name: np.asarray(value.to(torch.float64).numpy())
        for name, value in output.items()
        if isinstance(value, torch.Tensor)
    }
