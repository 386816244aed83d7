"""Biases that a trainer added to bias-free layers and did not save with its adapters.

The MTL-LoRA authors' wrapper gives such layers a random, frozen bias that is in no adapter
checkpoint. Whoever kept the whole state dict can hand these biases on in a file of their own:
a dictionary ``<module>.bias`` -> ``[O]`` for adapted modules, written by ``torch.save``.
They take the place of the base's (missing) biases for all tasks, where the base's class has
a switch for biases in its config; layers of the same switch that were not adapted get zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.files.torch_pickle import load_state_dict
from mtl_export.checkpoint.hashing import sha256_of_digests, sha256_of_file
from mtl_export.checkpoint.tensors import FLOAT_DTYPES, NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import BaseModelError, CheckpointError, UsageError, shortened

SUFFIX = ".bias"
# model_type -> config switch -> the layers that have a bias with it (transformers 5.23,
# models/llama/modeling_llama.py)
SWITCHES: dict[str, dict[str, frozenset[str]]] = {
    "llama": {
        "attention_bias": frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
        "mlp_bias": frozenset({"gate_proj", "up_proj", "down_proj"}),
    },
}


def with_biases(checkpoint: Checkpoint, file: Path) -> Checkpoint:
    """Return ``checkpoint`` with the biases in ``file``.

    Raises:
        UsageError: There is no such file, or each task brings an adapter of its own.
        CheckpointError: It holds something other than biases of adapted modules.
        IntegrityError: The pickle asks to run code.
    """
    if not file.is_file() or checkpoint.members:
        raise UsageError(
            f"--biases {file}: {'one adapter per task' if file.is_file() else 'no such file'}",
            expected="a file of biases for a checkpoint that all tasks share",
            fix="Correct --biases, or leave it out",
        )
    biases = load_state_dict(file)
    problems = [
        f"{name!r} ({tensor.dtype} {list(tensor.shape)})"
        for name, tensor in biases.items()
        if not name.endswith(SUFFIX)
        or name.removesuffix(SUFFIX) not in checkpoint.layers
        or name in checkpoint.replaced
        or tensor.dtype not in FLOAT_DTYPES
        or len(tensor.shape) != 1
    ]
    if problems or not biases:
        raise CheckpointError(
            f"{file}: {shortened(problems) if problems else 'nothing'}",
            expected=(
                "only <module>.bias [O] of modules that the checkpoint adapts, because they are "
                "added to these layers' outputs"
            ),
            fix="Keep these entries of the state dict and drop the others",
        )
    digests = {"checkpoint": checkpoint.sha256, "biases": sha256_of_file(file)}
    return dataclasses.replace(
        checkpoint,
        replaced=MappingProxyType({**checkpoint.replaced, **biases}),
        sha256=sha256_of_digests(digests),
        notes=(f"{len(biases)} biases that the trainer did not save come from {file.name}",),
    )


def biased_base(base: BaseModel, prefix: str, biases: Iterable[str]) -> BaseModel:
    """Return ``base`` with zeros for ``biases`` it lacks and its config switched to have them.

    Args:
        base: The base model.
        prefix: ``prefix + base tensor name`` is the name in the model class.
        biases: Names in the model class.

    Raises:
        BaseModelError: Its class has no switch for them.
    """
    lacking = [n for n in (b.removeprefix(prefix) for b in biases) if n not in base.tensors]
    if not lacking:
        return base
    switches = {
        switch: layers
        for switch, layers in SWITCHES.get(str(base.config.get("model_type")), {}).items()
        if any(_layer(name) in layers for name in lacking)
    }
    switched = frozenset().union(*switches.values())
    homeless = [name for name in lacking if _layer(name) not in switched]
    if homeless:
        raise BaseModelError(
            f"base {base.reference}: no place for {shortened(homeless)}",
            expected=(
                "a class with a config switch for these biases, such as LLaMA's attention_bias, "
                "because a merged folder must load into a class of transformers"
            ),
            fix="Leave out --biases",
        )
    added = {
        name: _zeros(name, weight)
        for weight_name, weight in base.tensors.items()
        if weight_name.endswith(".weight")
        and (name := weight_name.removesuffix(".weight") + SUFFIX) not in base.tensors
        and _layer(name) in switched
    }
    return dataclasses.replace(
        base,
        config=MappingProxyType({**base.config, **dict.fromkeys(switches, True)}),
        tensors=MappingProxyType({**base.tensors, **added}),
    )


def _layer(name: str) -> str:
    return name.removesuffix(SUFFIX).rpartition(".")[2]


def _zeros(name: str, weight: Tensor) -> Tensor:
    def load() -> Array:
        return np.zeros(weight.shape[:1], NUMPY_DTYPES[weight.dtype])

    return Tensor(name, weight.dtype, weight.shape[:1], load)
