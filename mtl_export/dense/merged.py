"""One task of a Swin as a folder of its own: ``config.json`` and ``model.safetensors``.

    import mtl_export as mx
    model = mx.load_dense("out/merged/sal")      # a torch module: image in, maps out
    model(image)["sal"]

No adapter is left in it: scales, patch merging's update and batch normalisations are folded. What
of a task's second stream cannot be folded are plain matrices of that one task, read by
``mtl_export.adapters.modules``; ``inspect`` says of each layer which.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mtl_export.adapters.modules.mtlora_layers import SwinModel
from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin
from mtl_export.checkpoint.files.json_file import Shape, read_json
from mtl_export.checkpoint.files.safetensors import open_safetensors, write_safetensors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.dense.model import DenseModel
from mtl_export.errors import CheckpointError, UsageError
from mtl_export.names import DENSE_FORMAT

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
# Our word -> transformers' word for the same, which config.json has.
STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
TORCH_DTYPES = {name: getattr(torch, name) for name in STORED.values()}
_SHAPE: Shape = {
    "format": str,
    "tasks": [str],
    "streams": [str],
    "image_size": int,
    "mode": str,
    "qk_scale": float,
    "dtype": frozenset(TORCH_DTYPES),
}


def write_merged(model: DenseModel, task: str, folder: Path, dtype: str = "fp32") -> None:
    """Write one task's folder.

    Args:
        model: As trained, at the size of image wanted.
        task: Its name.
        folder: Exists; gets the two files.
        dtype: ``fp32``, ``fp16`` or ``bf16``: what the weights are stored in.
    """
    tensors, described = model.folded([task])
    number = NUMPY_DTYPES[{"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]]
    stored = {name: value.numpy().astype(number) for name, value in tensors.items()}
    write_safetensors(folder / WEIGHTS_FILE, stored, {"format": "pt"})
    config = {
        "format": DENSE_FORMAT,
        "tasks": list(described.tasks),
        "streams": list(described.streams),
        "image_size": described.image_size,
        "mode": described.mode,
        "qk_scale": described.qk_scale,
        "dtype": STORED[dtype],
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_dense(folder: str | Path) -> MTLoRASwin:
    """Return the model of a folder that ``merge`` wrote for a dense task.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.

    Returns:
        A torch module in evaluation mode and in the dtype of its file: images ``[B, 3, H, H]``,
        normalised, to a dictionary of raw values ``[B, n, H, H]`` by task.

    Raises:
        UsageError: There is no such folder.
        CheckpointError: Its files do not fit each other.

    Example:
        >>> import mtl_export as mx, torch
        >>> model = mx.load_dense("out/merged/sal")
        >>> model(torch.zeros(1, 3, 64, 64))["sal"].shape
        torch.Size([1, 1, 64, 64])
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"{folder}: no {CONFIG_FILE} there",
            expected="a folder that mtl-export merge wrote for a task of a Swin",
            fix="Run mtl-export merge --task NAME",
        )
    fix = "Write the folder again with mtl-export merge --force"
    config = read_json(folder / CONFIG_FILE, _SHAPE, error=CheckpointError, fix=fix)
    described = SwinModel(
        tasks=tuple(config["tasks"]),
        image_size=config["image_size"],
        mode=config["mode"],
        qk_scale=config["qk_scale"],
        streams=tuple(config["streams"]),
    )
    stored = open_safetensors(folder / WEIGHTS_FILE).tensors
    tensors = {name: torch.from_numpy(one.widened()) for name, one in stored.items()}
    try:
        model = MTLoRASwin.from_tensors(tensors, described)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its tensors are not those of its configuration ({str(error)[:200]})",
            expected=f"the {WEIGHTS_FILE} that was written with its {CONFIG_FILE}",
            fix=fix,
        ) from error
    return model.to(TORCH_DTYPES[config["dtype"]])
