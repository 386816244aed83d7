"""Quantised bases are refused by name; left-over settings of full-precision ones are dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mtl_export.checkpoint.tensors import Array
from mtl_export_cli.main import cli
from tests.checkpoint import peft_toys as toys

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
WIDTH = 4
FULL = np.ones((WIDTH, WIDTH), np.float32)
SCALE = np.ones(1, np.float32)
STORED: dict[str, tuple[dict[str, Array], str]] = {
    "compressed-tensors": ({"weight": FULL.astype(ml_dtypes.float8_e4m3fn),
                            "weight_scale": SCALE}, "F8_E4M3"),
    "fp8": ({"weight": FULL.astype(ml_dtypes.float8_e4m3fn), "weight_scale_inv": SCALE},
            "F8_E4M3"),
    "bitsandbytes": ({"weight": FULL.astype(np.int8), "SCB": SCALE}, "I8"),
    "bitsandbytes 4": ({"weight": np.ones((8, 1), np.uint8), "weight.absmax": SCALE}, "U8"),
    "gptq": ({"qweight": np.ones((1, WIDTH), np.int32), "scales": SCALE}, "packed"),
}  # fmt: skip


def project(folder: Path, stored: Mapping[str, Array], method: str, adapted: str = Q) -> list[str]:
    """Write a base of one layer stored so and an adapter; return the options that name them."""
    tensors = {f"{Q}.{kind}": value for kind, value in stored.items()}
    tensors |= {f"{V}.weight": FULL, "model.embed_tokens.weight": np.ones((5, WIDTH), np.float32)}
    (folder / "base").mkdir()
    save_file(tensors, str(folder / "base" / "model.safetensors"), {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 5,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": method.partition(" ")[0]},
    }  # fmt: skip
    (folder / "base" / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(2)
    adapter = {
        f"{adapted}.lora_{part}.weight": toys.draw(generator, *shape)
        for part, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2)))
    }
    fields = {"task_type": "CAUSAL_LM", "modules_to_save": None}
    toys.write(folder / "adapter", adapter, fields)
    return ["-c", str(folder / "adapter"), "-b", str(folder / "base")]


@pytest.mark.parametrize("method", sorted(STORED))
@pytest.mark.parametrize("command", ["inspect", "plan", "merge", "onnx"])
def test_adapters_of_quantised_layers_are_refused(
    command: str, method: str, tmp_path: Path
) -> None:
    """Exit 5 with the method, how it is stored, and the way out; never a traceback."""
    stored, dtype = STORED[method]
    options = project(tmp_path, stored, method)
    options += ["--all-tasks"] if command in {"merge", "onnx"} else []
    options += ["-o", str(tmp_path / "out")] if command in {"merge", "onnx"} else []
    outcome = CliRunner().invoke(cli, [command, *options])
    message = " ".join(outcome.stderr.split())
    assert outcome.exit_code == 5
    assert method.partition(" ")[0] in message
    assert dtype in message
    assert "dequantize()" in message


def merged_config(folder: Path, options: list[str]) -> dict[str, Any]:
    """Return the config of the merged task."""
    arguments = ["merge", "--all-tasks", *options, "-o", str(folder / "out")]
    outcome = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0
    (path,) = (folder / "out").glob("*/config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def test_full_precision_weights_lose_left_over_settings(tmp_path: Path) -> None:
    """They would make from_pretrained quantise the merged model."""
    options = project(tmp_path, {"weight": FULL}, "bitsandbytes")
    assert "quantization_config" not in merged_config(tmp_path, options)


def test_layers_beside_quantised_ones_are_merged(tmp_path: Path) -> None:
    """Mixtures whose experts alone are quantised keep them, and the settings that say so."""
    options = project(tmp_path, STORED["bitsandbytes"][0], "bitsandbytes", adapted=V)
    assert merged_config(tmp_path, options)["quantization_config"] == {
        "quant_method": "bitsandbytes"
    }
