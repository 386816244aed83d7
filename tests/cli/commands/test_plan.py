from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import MambaConfig, MambaForCausalLM

from tests.cli.conftest import Run, files_below


def test_every_strategy_has_a_row(project: Path, run: Run) -> None:
    """The table names them, the last lines say which to take and what to type."""
    outcome = run("plan")
    assert outcome.code == 0
    for name in ("merged, standalone", "merged, shared", "single-graph", "engine per task"):
        assert name in outcome.stdout
    assert "recommended  single-graph: one copy of the base serves all 3 tasks" in outcome.stdout
    assert "mtl-export onnx --all-tasks" in outcome.stdout
    assert files_below(project / "out") == []


def test_json_has_the_figures(project: Path, run: Run) -> None:
    """Programs get bytes and seconds; the merged size is the one merge then writes."""
    document = run("plan", "--task", "spam", "--json").json
    assert document["ok"] is True
    assert document["recommended"] == "merged, standalone"
    merged = document["strategies"][0]
    assert merged["command"] == "mtl-export merge --task spam"
    (output,) = run("merge", "--task", "spam", "--json").json["outputs"]
    assert output["files"]["model.safetensors"]["size_bytes"] == merged["disk_bytes"]


def test_no_export_is_recommended_that_would_be_refused(tmp_path: Path, run: Run) -> None:
    """A model that keeps another state than keys and values is merged; both say why."""
    config = MambaConfig(vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=1)
    with torch.random.fork_rng():
        MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    inner, layer = 64, "base_model.model.backbone.layers.0.mixer.in_proj"
    for task in ("alpha", "beta"):
        folder = tmp_path / "adapters" / task
        folder.mkdir(parents=True)
        tensors = {
            f"{layer}.lora_A.weight": np.ones((2, 16), np.float32),
            f"{layer}.lora_B.weight": np.ones((inner, 2), np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["in_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    words = ["-c", str(tmp_path / "adapters"), "-b", str(tmp_path / "base"),
             "--tasks", "alpha,beta", "-o", str(tmp_path / "out")]  # fmt: skip
    document = run("plan", *words, "--json").json
    assert document["recommended"] == "merged, shared"
    assert [one["name"] for one in document["strategies"]] == [
        "merged, standalone", "merged, shared",
    ]  # fmt: skip
    assert "no cache" in document["refused"]
    refused = run("onnx", "--all-tasks", *words)
    assert refused.code == 5
    assert document["refused"] in refused.stderr
