"""A folder of one dense task as a runner, in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mtl_export.adapters.modules.mtlora_swin import MTLoRASwin
from mtl_export.checkpoint.tensors import Array
from mtl_export.dense.merged import load_dense
from mtl_export.names import IMAGE


class DenseRunner:
    """One folder that ``merge`` wrote.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
    """

    name = "pytorch"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model: MTLoRASwin | None = None

    def __enter__(self) -> DenseRunner:
        """Load the model.

        Raises:
            CheckpointError: Its files do not fit each other.
        """
        self._model = load_dense(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model."""
        self._model = None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the maps by task, float64."""
        assert self._model is not None
        dtype = next(self._model.parameters()).dtype
        with torch.inference_mode():
            outputs = self._model(torch.from_numpy(inputs[IMAGE]).to(dtype))
        return {task: value.double().numpy() for task, value in outputs.items()}
