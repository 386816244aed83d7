"""Write one task as a standalone model folder, tensor by tensor.

Nothing is loaded as a model: each base tensor is read, folded if the task touches
it, and written. Memory is that of the largest tensor, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import SINGLE_FILE, companion_files
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, NUMPY_DTYPES, Array, Tensor
from mtl_export.merge.merge import merged_weight, rounded

# --dtype word -> (safetensors dtype, transformers config dtype)
DTYPES = {
    "fp32": ("F32", "float32"),
    "fp16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Array]

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize


def merged_size_bytes(bound: BoundModel, dtype: str | None) -> int:
    """Return about how many bytes one merged task takes on disk."""
    return sum(
        int(np.prod(tensor.shape, dtype=np.int64))
        * NUMPY_DTYPES[_output_dtype(tensor, dtype)].itemsize
        for tensor in bound.base.tensors.values()
    )


def write_merged(
    bound: BoundModel,
    task: Task,
    folder: Path,
    *,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write ``task`` merged into the base as a folder that ``from_pretrained`` loads.

    Args:
        bound: The adapter and its base.
        task: The task to fold in.
        folder: An existing, empty folder.
        dtype: ``fp32``, ``fp16`` or ``bf16``; None keeps each tensor's own.
        progress: Called with bytes done and bytes in all.

    Raises:
        BaseModelError: A weight is not finite in the output dtype.
    """
    entries = list(_entries(bound, task, dtype))
    _write_safetensors(folder / SINGLE_FILE, entries, progress)
    config = task_config(bound, task, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(bound.base):
        shutil.copyfile(file, folder / file.name)


def task_config(bound: BoundModel, task: Task, dtype: str | None) -> dict[str, Any]:
    """Return ``config.json`` for a model that serves only ``task``."""
    config = dict(bound.base.config)
    if bound.adapters.model_class:
        config["architectures"] = [bound.adapters.model_class]
    if task.labels:
        config["id2label"] = {str(index): label for index, label in enumerate(task.labels)}
        config["label2id"] = {label: index for index, label in enumerate(task.labels)}
        config["problem_type"] = task.kind
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = DTYPES[dtype][1]
    return config


def _entries(bound: BoundModel, task: Task, dtype: str | None) -> Iterator[_Entry]:
    layers, heads = bound.adapters.layers, bound.adapters.heads
    for base_name, tensor in bound.base.tensors.items():
        name = bound.prefix + base_name
        module, _, kind = name.rpartition(".")
        if module in heads:
            continue
        out = _output_dtype(tensor, dtype)
        replaced = bound.adapters.replacement(name, task.index)
        if replaced is not None:
            yield _Entry(name, out, tensor.shape, _cast(replaced, out, name))
        elif module in layers and kind == "weight":
            yield _Entry(name, out, tensor.shape, _merged(tensor, bound, module, task.index, out))
        else:
            yield _Entry(name, out, tensor.shape, _converted(tensor, out, name))
    touched = bound.base_tensor(f"{next(iter(layers))}.weight")
    out = _output_dtype(touched, dtype)
    for module, task_heads in heads.items():
        head = task_heads[task.index]
        for kind, values in (("weight", head.weight), ("bias", head.bias)):
            name = f"{module}.{kind}"
            yield _Entry(name, out, values.shape, _cast(values, out, name))


def _output_dtype(tensor: Tensor, dtype: str | None) -> str:
    return DTYPES[dtype][0] if dtype and tensor.dtype in FLOAT_DTYPES else tensor.dtype


def _merged(
    tensor: Tensor, bound: BoundModel, module: str, task_index: int, out: str
) -> Callable[[], Array]:
    layer = bound.adapters.layers[module]
    return lambda: merged_weight(tensor.numpy(), layer, task_index, out)


def _converted(tensor: Tensor, out: str, name: str) -> Callable[[], Array]:
    if tensor.dtype == out:
        return tensor.numpy
    return lambda: rounded(tensor.numpy(), out, name)


def _cast(values: Array, out: str, name: str) -> Callable[[], Array]:
    return lambda: rounded(values, out, name)


def _write_safetensors(path: Path, entries: list[_Entry], progress: Progress) -> None:
    """Stream ``entries`` to ``path`` (layout: ``mtl_export.checkpoint.safetensors``)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size_bytes],
        }
        offset += entry.size_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data must start on a multiple of 8 bytes
    done = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for entry in entries:
            np.ascontiguousarray(entry.values()).tofile(file)
            done += entry.size_bytes
            progress(done, offset)
