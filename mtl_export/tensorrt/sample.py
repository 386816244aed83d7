"""An engine's manifest -> one set of inputs, and the answers of the engine to it.

For comparing engines of one model with one another on a GPU: a refitted one with itself,
a refittable one with a plain one. Whether the answers are right is for parity to say.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.tensorrt.api import Library
from mtl_export.tensorrt.manifest import EngineManifest
from mtl_export.tensorrt.runner import EngineSession


def answers_of(library: Library, path: Path, manifest: EngineManifest) -> dict[str, Array]:
    """Return what the engine at ``path`` answers to ``sample_inputs``, on the GPU.

    Raises:
        BackendMissingError: torch sees no CUDA device.
        EngineRunError: The engine cannot be opened or run.
        IntegrityError: It is not what its manifest says.
    """
    return EngineSession(library, path, manifest).run(sample_inputs(manifest), 0)


def sample_inputs(manifest: EngineManifest) -> dict[str, Array]:
    """Return the same inputs for every engine of a model: some tokens, all of them seen.

    Shapes are the first profile's best. Ids count 0 to 7, masks are 1, types and tasks 0,
    and numbers such as hidden states are seeded.
    """
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in manifest.inputs:
        shape = tuple(int(size) for size in tensor.shape if not isinstance(size, str))
        if tensor.is_dynamic:
            shape = manifest.profiles[0].shapes[tensor.name][1]
        values: Array
        if "mask" in tensor.name:
            values = np.ones(shape)
        elif tensor.name.endswith("input_ids"):
            values = np.arange(int(np.prod(shape))).reshape(shape) % 8
        elif "float" in tensor.dtype:
            values = random.standard_normal(shape) * 0.5
        else:
            values = np.zeros(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    return inputs
