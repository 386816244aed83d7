"""One PEFT LoRA folder per task, for adapters that are plain low rank per task.

    W_t = W + up . core_t . down    ->    lora_A = down, lora_B = up . core_t, scaling 1

``core_t`` holds every scale and is folded into B in float64, which is then rounded once, to
float32; alpha = r makes PEFT's own factor 1. Heads become ``modules_to_save``. A module's
rank may differ from the others' (``rank_pattern``, ``alpha_pattern``).

Key names and config fields: https://github.com/huggingface/peft, release 0.21.2,
``tuners/lora/config.py`` and ``utils/save_and_load.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtl_export.adapters.normal_form import AdapterSet, Factors
from mtl_export.checkpoint.checkpoint import Checkpoint, Task
from mtl_export.checkpoint.files.safetensors import write_safetensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, shortened

# How transformers classes end -> PEFT's word for what they do.
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Modules that PEFT saves whole in every classifier, whatever modules_to_save says.
WHOLE_HEADS = ("classifier", "score")


def write_peft_folders(path: Path, checkpoint: Checkpoint, adapters: AdapterSet) -> None:
    """Write ``path/<task>`` for every task; a user gives PEFT the base with that many labels.

    Args:
        path: An existing folder.
        checkpoint: Where ``adapters`` came from; names the base.
        adapters: The checkpoint in normal form.

    Raises:
        AdapterError: It is more than a low-rank term per layer and a head.
    """
    refuse_more_than_low_rank(checkpoint, adapters)
    for task in adapters.tasks:
        _write_task(path / task.name, task, checkpoint, adapters)


def refuse_more_than_low_rank(checkpoint: Checkpoint, adapters: AdapterSet) -> None:
    """Refuse what PEFT's plain LoRA cannot hold.

    Raises:
        AdapterError: With everything that is in the way.
    """
    layers = adapters.layers.values()
    gains = [layer.module for layer in layers if layer.gain is not None]
    biases = [layer.module for layer in layers if layer.bias is not None]
    embeddings = [
        module
        for member in checkpoint.members or (checkpoint,)
        for module, layer in member.layers.items()
        if layer.embedding
    ]
    others = [*adapters.replaced, *adapters.own_tensors]
    problems = [f"rescaled outputs ({shortened(gains, 2)})"] if gains else []
    problems += [f"trained biases ({shortened(biases, 2)})"] if biases else []
    problems += [f"adapted embeddings ({shortened(embeddings, 2)})"] if embeddings else []
    problems += [f"trained base tensors ({shortened(others, 2)})"] if others else []
    problems += ["a head that no transformers class has"] if checkpoint.readouts else []
    if problems:
        raise AdapterError(
            f"{checkpoint.path}: {'; '.join(problems)}",
            expected=(
                "low-rank terms and heads only, because a plain LoRA folder of PEFT holds W + B A "
                "and nothing else"
            ),
            fix="Leave out --convert-format to write mtl-export's own folder, which holds it all",
        )


def _write_task(path: Path, task: Task, checkpoint: Checkpoint, adapters: AdapterSet) -> None:
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for module, layer in adapters.layers.items():
        factors = layer.factors(task.index)
        if factors is None:
            continue
        down, up = low_rank(factors)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        ranks[module] = len(down)
    for module, heads in adapters.heads.items():
        tensors[f"base_model.model.{module}.weight"] = heads[task.index].weight
        tensors[f"base_model.model.{module}.bias"] = heads[task.index].bias
    path.mkdir(parents=True)
    write_safetensors(
        path / "adapter_model.safetensors",
        {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())},
        {"format": "pt"},
    )
    transposed = any(adapters.layers[module].transposed for module in ranks)
    config = _config(checkpoint, adapters, ranks, transposed=transposed)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def low_rank(factors: Factors) -> tuple[Array, Array]:
    """Return A ``[r, I]`` and B ``[O, r]``, float32, with B A = up core down."""
    folded = factors.up.astype(np.float64) @ factors.core.astype(np.float64)
    return factors.down.astype(np.float32), folded.astype(np.float32)


def _config(
    checkpoint: Checkpoint, adapters: AdapterSet, ranks: Mapping[str, int], *, transposed: bool
) -> dict[str, Any]:
    """Return the fields of PEFT's ``LoraConfig`` that are not its defaults, and the main ones."""
    rank = max(ranks.values(), default=1)
    pattern = {module: own for module, own in sorted(ranks.items()) if own != rank}
    model_class = adapters.model_class
    endings = (kind for ending, kind in TASK_TYPES.items() if model_class.endswith(ending))
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": checkpoint.base.id,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted({_saved_whole(module) for module in adapters.heads}) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": sorted(ranks),
        "task_type": next(endings, None),
        "use_dora": False,
        "use_rslora": False,
    }


def _saved_whole(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in WHOLE_HEADS else module
