"""PEFT folders that ``inspect --convert-format peft`` writes, loaded by PEFT itself.

Opt-in: ``pytest -m peft_env tests/environments/test_peft_convert.py``. It makes a virtual
environment and installs ``peft`` there, unless PEFT_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import (
    BaseReference,
    Checkpoint,
    HeadTensors,
    LayerTensors,
    Task,
)
from mtl_export.checkpoint.convert import write_checkpoint
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array, Tensor
from mtl_export.runtime.runners.pytorch import OracleRunner
from mtl_export_cli.main import cli
from tests.adapters import toys
from tests.adapters.test_ta_lora import layer_values as ta_lora_values

pytestmark = [pytest.mark.peft_env, pytest.mark.timeout(1800)]

REQUIREMENTS = ("peft==0.21.2", "torch==2.13.0", "transformers==5.23.0")
SIZES = {
    "vocab_size": 53, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": 40,
}  # fmt: skip
GPT2 = {
    "vocab_size": 53, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TASKS = (
    Task("tone", 0, ("bad", "good"), "single_label_classification"),
    Task("topic", 1, ("who", "what", "where", "when"), "single_label_classification"),
    Task("stars", 2, ("stars",), "regression"),
)


@dataclass(frozen=True)
class Model:
    """A base, and what is adapted in it.

    Attributes:
        stem: Of its classes in transformers.
        sizes: Of its config.
        modules: Adapted layers, (outputs, inputs) by name.
        heads: Linear layers of the head by name; outputs of None are the labels.
    """

    stem: str
    sizes: Mapping[str, Any]
    modules: Mapping[str, tuple[int, int]]
    heads: Mapping[str, int | None]


MODELS = {
    "bert": Model(
        "Bert", SIZES,
        {"bert.encoder.layer.0.attention.self.query": (12, 12),
         "bert.encoder.layer.1.output.dense": (12, 20)},
        {"classifier": None},
    ),
    "bert pooler": Model(
        "Bert", SIZES, {"bert.encoder.layer.1.intermediate.dense": (20, 12)},
        {"bert.pooler.dense": 12, "classifier": None},
    ),
    "roberta": Model(
        "Roberta", SIZES | {"pad_token_id": 1},
        {"roberta.encoder.layer.1.intermediate.dense": (20, 12)},
        {"classifier.dense": 12, "classifier.out_proj": None},
    ),
    "gpt2": Model(
        "GPT2", GPT2,
        {"transformer.h.0.attn.c_attn": (36, 12), "transformer.h.1.mlp.c_fc": (48, 12)},
        {"score": None},
    ),
}  # fmt: skip


def mtl_lora(seed: int, outputs: int, inputs: int) -> tuple[dict[str, Array], dict[str, float]]:
    """Return an MTL-LoRA layer."""
    values = toys.layer_values(seed, outputs=outputs, inputs=inputs, scaler=True, dtype="F32")
    return values, {"alpha": 7.0, "temperature": 0.3}


def ta_lora(seed: int, outputs: int, inputs: int) -> tuple[dict[str, Array], dict[str, float]]:
    """Return a TA-LoRA layer."""
    values = ta_lora_values(seed, outputs=outputs, inputs=inputs, dtype="F32")
    return values, {"alpha": 3.0, "gate_softmax": 0.0}


def moe_lora(seed: int, outputs: int, inputs: int) -> tuple[dict[str, Array], dict[str, float]]:
    """Return a task-gated MoE-LoRA layer."""
    draw = np.random.default_rng(seed).normal
    values = {
        "down": draw(size=(2, 3, inputs)), "up": draw(size=(2, outputs, 3)) * 0.5,
        "gate": draw(size=(3, 2)),
    }  # fmt: skip
    return values, {"alpha": 3.0}


FAMILIES: dict[str, Callable[..., tuple[dict[str, Array], dict[str, float]]]] = {
    "mtl_lora": mtl_lora, "ta_lora": ta_lora, "moe_lora": moe_lora,
}  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a Python that has PEFT."""
    if named := os.environ.get("PEFT_PYTHON"):
        return Path(named)
    folder = tmp_path_factory.mktemp("peft") / "env"
    venv.create(folder, with_pip=True)
    found = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([found, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return found


@pytest.mark.parametrize(
    ("model", "family"),
    [("bert", name) for name in FAMILIES]
    + [("bert pooler", "mtl_lora"), ("roberta", "ta_lora"), ("gpt2", "mtl_lora")],
)
def test_peft_computes_the_same_logits(
    tmp_path: Path, python: Path, model: str, family: str
) -> None:
    """Unmerged oracle in float64 against PEFT on the folders, per task."""
    base = base_folder(tmp_path / "base", MODELS[model])
    write_checkpoint(tmp_path / "own", checkpoint_of(MODELS[model], family))
    assert_same_logits(tmp_path, python, MODELS[model], base)


def test_tasks_with_adapters_of_their_own(tmp_path: Path, python: Path) -> None:
    """One LoRA per task, of unequal ranks and targets."""
    model = MODELS["bert"]
    base = base_folder(tmp_path / "base", model)
    whole = checkpoint_of(model, "lora_members")
    write_checkpoint(tmp_path / "own", whole)
    assert_same_logits(tmp_path, python, model, base)


def assert_same_logits(folder: Path, python: Path, model: Model, base: Path) -> None:
    """Convert ``folder/own`` and compare what PEFT computes with the oracle."""
    out = folder / "peft"
    (folder / "empty.toml").write_text("")
    words = ["inspect", "-c", str(folder / "own"), "-b", str(base), "--convert", str(out)]
    words += ["--convert-format", "peft", "--config", str(folder / "empty.toml")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    inputs = toys.token_rows(4, 7)
    if model.stem != "Bert":
        del inputs["token_type_ids"]
        inputs["input_ids"] = np.maximum(inputs["input_ids"], 3)
    pad = model.sizes.get("pad_token_id", 0)
    inputs["input_ids"] = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], pad)
    np.savez(out / "inputs.npz", **inputs)  # type: ignore[arg-type]
    (out / "labels.json").write_text(json.dumps({t.name: len(t.labels) for t in TASKS}))
    script = Path(__file__).with_name("peft_load.py")
    model_class = f"{model.stem}ForSequenceClassification"
    subprocess.run([python, script, base, model_class, out], check=True)
    checkpoint, opened = open_checkpoint(folder / "own"), open_base(str(base))
    bound = bind(checkpoint, read_adapters(checkpoint, opened), opened)
    with OracleRunner(bound, "fp64") as oracle:
        for task in TASKS:
            ids = np.full(4, task.index)
            expected = oracle.infer({**inputs, "task_ids": ids})["logits"][:, : len(task.labels)]
            found = np.load(out / task.name / "logits.npy")
            # B is rounded to float32 once; everything else is computed in float64.
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
            assert np.abs(expected).max() > 0.1


def base_folder(folder: Path, model: Model) -> Path:
    """Write a base whose every parameter is drawn at random."""
    import transformers

    config = getattr(transformers, f"{model.stem}Config")(**model.sizes)
    base = getattr(transformers, f"{model.stem}Model")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "ln_" in name or "LayerNorm" in name:
                parameter.add_(1.0)
    base.save_pretrained(folder)
    return folder


def checkpoint_of(model: Model, family: str) -> Checkpoint:
    """Return a checkpoint of ``TASKS`` on ``model``."""
    generator = np.random.default_rng(9)

    def draw(*shape: int) -> Tensor:
        values = generator.normal(size=shape).astype(np.float32)
        return toys.memory_tensor("drawn", values)

    width = 12
    heads = {
        module: tuple(
            HeadTensors(
                draw(size or len(task.labels), width),
                # GPT-2's has none.
                None if module == "score" else draw(size or len(task.labels)),
            )
            for task in TASKS
        )
        for module, size in model.heads.items()
    }
    whole = Checkpoint(
        path=Path("memory"),
        format="test",
        family="lora" if family == "lora_members" else family,
        tasks=TASKS,
        layers=MappingProxyType({}),
        heads=MappingProxyType(heads),
        base=BaseReference(),
        model_class=f"{model.stem}ForSequenceClassification",
        sha256="",
    )
    if family == "lora_members":
        return replace(
            whole,
            heads=MappingProxyType({}),
            members=tuple(_member(whole, model, task, draw) for task in TASKS),
        )
    layers = {}
    for seed, (module, shape) in enumerate(model.modules.items()):
        values, hyper = FAMILIES[family](seed, *shape)
        tensors = {role: toys.memory_tensor(role, value) for role, value in values.items()}
        layers[module] = LayerTensors(module, tensors, hyper)
    return replace(whole, layers=MappingProxyType(layers))


def _member(whole: Checkpoint, model: Model, task: Task, draw: Callable[..., Tensor]) -> Checkpoint:
    """Return one task's own LoRA: its rank and its targets depend on its id."""
    ranks = {module: task.index + 1 + i for i, module in enumerate(model.modules)}
    if task.index == 1:
        ranks.popitem()
    return replace(
        whole,
        tasks=(replace(task, index=0),),
        layers={
            module: LayerTensors(
                module,
                {"down": draw(rank, model.modules[module][1]),
                 "up": draw(model.modules[module][0], rank)},
                {"alpha": 2.5},
            )
            for module, rank in ranks.items()
        },
        heads={module: (heads[task.index],) for module, heads in whole.heads.items()},
    )  # fmt: skip
