"""``head.safetensors``: a task's head where no transformers class can hold it.

The merged folder is then the bare base's, which ``from_pretrained`` loads as it is, and the
head lies beside it: ``head.0.weight`` ``[O, I]``, ``head.0.bias`` ``[O]``, ``head.1.weight``
and so on. The file's metadata says how they are applied: ``pooling`` (``first``, ``last``,
``pooler`` or ``tokens``) and ``activations``, transformers' names, one after each layer but the
last, joined by commas. The ONNX graphs of the same checkpoint have the head inside.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast, get_args

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Pooling, Readout, Task
from mtl_export.checkpoint.files.safetensors import open_safetensors, write_safetensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError
from mtl_export.merge.fold import rounded

HEAD_FILE = "head.safetensors"


def has_head_file(bound: BoundModel, task: Task) -> bool:
    """Return whether ``task``'s head lies beside its merged model."""
    readout = bound.checkpoint.readout_of(task)
    return readout is not None and not readout.is_bare


def write_head(bound: BoundModel, task: Task, folder: Path, dtype: str) -> None:
    """Write ``task``'s head beside its merged base.

    Args:
        bound: A checkpoint with readouts.
        task: The task.
        folder: The merged folder.
        dtype: A key of ``NUMPY_DTYPES``.

    Raises:
        BaseModelError: A weight does not fit the dtype's range.
    """
    readout = bound.checkpoint.readout_of(task)
    if readout is None or readout.is_bare:
        raise ValueError("the model class has this head itself, or the task has none")
    tensors: dict[str, Array] = {}
    # Alone in its folder the task's head needs no name.
    for module, own in zip(readout.modules, replace(readout, name="").modules, strict=True):
        head = bound.adapters.heads[module][task.index]
        for kind, values in (("weight", head.weight), ("bias", head.bias)):
            name = f"{own}.{kind}"
            tensors[name] = np.ascontiguousarray(rounded(values, dtype, name))
    write_safetensors(
        folder / HEAD_FILE,
        tensors,
        {
            "format": "pt",
            "pooling": readout.pooling,
            "activations": ",".join(readout.activations),
        },
    )


def read_readout(file: Path) -> tuple[Readout, dict[str, tuple[int, ...]]]:
    """Return what a ``head.safetensors`` computes, and the shapes of its weights by module.

    Raises:
        CheckpointError: It is no file that ``write_head`` wrote.
    """
    stored = open_safetensors(file)
    words = stored.metadata.get("activations", "")
    pooling = stored.metadata.get("pooling", "")
    readout = Readout(cast(Pooling, pooling), tuple(words.split(",")) if words else ())
    names = {f"{module}.{kind}" for module in readout.modules for kind in ("weight", "bias")}
    if pooling not in get_args(Pooling) or stored.tensors.keys() != names:
        raise CheckpointError(
            f"{file}: pooling {pooling!r} and {len(stored.tensors)} tensors",
            expected=(
                f"{', '.join(sorted(names))}, and how they are applied, because the head is "
                "rebuilt from them"
            ),
            fix="Merge again with --force",
        )
    return readout, {m: stored.tensors[f"{m}.weight"].shape for m in readout.modules}


def head_note(bound: BoundModel, task: Task) -> str | None:
    """Return what to tell of a head that is not in the merged model, None if it is.

    The sentence ends without a full stop.
    """
    readout = bound.checkpoint.readout_of(task)
    if readout is None or not has_head_file(bound, task):
        return None
    states = {
        "first": "the first token's hidden state",
        "last": "the hidden state of the last token that is not padding",
        "pooler": "the pooler's output",
        "tokens": "every token's hidden state",
    }[readout.pooling]
    layers = len(readout.modules)
    functions = (
        f" with {', '.join(dict.fromkeys(readout.activations))} between" if layers > 1 else ""
    )
    return (
        f"no transformers class has this head ({layers} linear layer{'s' * (layers > 1)}"
        f"{functions}, on {states}): model.safetensors is the bare {bound.adapters.model_class},"
        f" the head lies beside it in {HEAD_FILE}; ONNX graphs have it inside"
    )
