"""Adapted layers that the model never calls: their delta was never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.adapters.modules.calls import uncalled
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import UnusableBaseError
from tests.checkpoint import peft_toys as toys

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 23}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 32}
MIXER = "backbone.layers.0.mixer."
# class, config, called layers, layers whose weight is read
CASES: list[tuple[str, str, dict[str, Any], list[str], list[str]]] = [
    ("MambaForCausalLM", "MambaConfig", {}, [f"{MIXER}{n}" for n in ("in_proj", "x_proj")],
     [f"{MIXER}dt_proj"]),
    ("FalconMambaForCausalLM", "FalconMambaConfig", {}, [f"{MIXER}x_proj"], [f"{MIXER}dt_proj"]),
    ("JambaForCausalLM", "JambaConfig", {**HEADS, "num_key_value_heads": 2, "num_experts": 2},
     ["model.layers.0.mamba.x_proj"], ["model.layers.0.mamba.dt_proj"]),
    ("SiglipVisionModel", "SiglipVisionConfig", {**HEADS, "image_size": 8, "patch_size": 4},
     ["encoder.layers.0.self_attn.out_proj"], ["head.attention.out_proj"]),
    ("BertForMaskedLM", "BertConfig", HEADS, ["cls.predictions.decoder"], []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "settings", "called", "read"), CASES)
def test_layers_whose_weight_is_only_read_are_found(
    name: str, config: str, settings: dict[str, Any], called: list[str], read: list[str]
) -> None:
    """Each is a layer that the class has; a run with hooks calls the others only."""
    made = getattr(transformers, config)(**{**SMALL, **settings})
    assert uncalled(name, made.to_dict(), [*called, *read]) == read


def test_a_run_calls_no_layer_that_is_said_to_be_read() -> None:
    """The source is not misread: hooks on a Mamba see in_proj, and never dt_proj."""
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL)).eval()
        seen: set[str] = set()
        for name in ("in_proj", "dt_proj"):
            layer = model.get_submodule(MIXER + name)
            layer.register_forward_hook(lambda *_, name=name: seen.add(name))
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))
    assert seen == {"in_proj"}


@pytest.mark.parametrize("layer", ["dt_proj", "in_proj"])
def test_an_adapter_of_such_a_layer_is_refused(tmp_path: Path, layer: str) -> None:
    """Mamba reads dt_proj's weight: folding its delta would change what was never trained."""
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL))
        model.save_pretrained(tmp_path / "base")
    outputs, inputs = model.get_parameter(f"{MIXER}{layer}.weight").shape
    generator = np.random.default_rng(1)
    tensors = {
        f"{MIXER}{layer}.lora_A.weight": toys.draw(generator, 2, inputs),
        f"{MIXER}{layer}.lora_B.weight": toys.draw(generator, outputs, 2),
    }
    fields = {"task_type": "CAUSAL_LM", "modules_to_save": None}
    checkpoint = open_checkpoint(toys.write(tmp_path / "adapter", tensors, fields))
    base = open_base(str(tmp_path / "base"))
    adapters = read_adapters(checkpoint, base)
    if layer == "in_proj":
        assert bind(checkpoint, adapters, base).prefix == ""
        return
    with pytest.raises(UnusableBaseError, match="never calls") as caught:
        bind(checkpoint, adapters, base)
    assert MIXER + layer in caught.value.problem


def test_zeros_that_stayed_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """What PEFT writes of a layer that is never called is its start, a delta of zero."""
    with quiet_transformers():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL))
        model.save_pretrained(tmp_path / "base")
    outputs, inputs = model.get_parameter(f"{MIXER}dt_proj.weight").shape
    tensors = {
        f"{MIXER}dt_proj.lora_A.weight": toys.draw(np.random.default_rng(1), 2, inputs),
        f"{MIXER}dt_proj.lora_B.weight": np.zeros((outputs, 2), np.float32),
    }
    fields = {"task_type": "CAUSAL_LM", "modules_to_save": None}
    checkpoint = open_checkpoint(toys.write(tmp_path / "adapter", tensors, fields))
    base = open_base(str(tmp_path / "base"))
    assert set(bind(checkpoint, read_adapters(checkpoint, base), base).adapters.layers) == {
        f"{MIXER}dt_proj"
    }
