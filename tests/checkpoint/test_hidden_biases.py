"""Biases from a file of their own: placed in merged folder and oracle, refused where homeless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.modules.base import quiet_transformers
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, CheckpointError, UsageError
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner
from mtl_export_cli.main import cli
from tests.checkpoint import official_toys as toys
from tests.checkpoint.messages import assert_whole

HIDDEN, FFN, VOCABULARY = 12, 20, 31
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (HIDDEN, HIDDEN), DOWN: (HIDDEN, FFN)}
IDS = np.random.default_rng(2).integers(0, VOCABULARY, (4, 6))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a toy LLaMA, a run of the authors' trainer, and its biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biases")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=32,
        initializer_range=0.3,
    )  # fmt: skip
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    toys.write(folder / "run" / "final_checkpoint.pt", toys.flat(states()))
    toys.write(folder / "biases.pt", biases())
    return folder


def states() -> dict[str, toys.State]:
    """Return the adapters' tensors."""
    return {
        module: toys.mtl_lora(toys.Drawer(seed), *shape)
        for seed, (module, shape) in enumerate(SHAPES.items())
    }


def biases() -> dict[str, Array]:
    """Return one bias per adapted layer."""
    return {f"{module}.bias": toys.Drawer(9)(shape[0]) for module, shape in SHAPES.items()}


def bound_project(project: Path, file: Path, base: Path | None = None) -> BoundModel:
    """Return the run bound to its base, with the biases in ``file``."""
    checkpoint = open_checkpoint(
        project / "run", alpha=toys.ALPHA, temperature=toys.TEMPERATURE, biases=file
    )
    opened = open_base(str(base or project / "base"))
    return bind(checkpoint, read_adapters(checkpoint, opened), opened)


def expected(project: Path, task: int) -> Array:
    """Return logits of the base with deltas added and biases added to the layers' outputs."""
    from transformers import LlamaForCausalLM

    with quiet_transformers():
        model: Any = LlamaForCausalLM.from_pretrained(project / "base", dtype=torch.float64)
    for module, state in states().items():
        layer = model.get_submodule(module)
        delta = toys.delta(state, layer.weight.detach().numpy(), task)
        bias = torch.from_numpy(biases()[f"{module}.bias"]).double()
        with torch.no_grad():
            layer.weight.add_(torch.from_numpy(delta))
        layer.register_forward_hook(lambda _, __, output, bias=bias: output + bias)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(IDS)).logits.numpy())


def test_merged_folders_and_oracle_have_the_biases(project: Path, tmp_path: Path) -> None:
    """Adapted layers get theirs, their neighbours zeros, the config the switch for both."""
    words = ["-c", str(project / "run"), "-b", str(project / "base"), "--alpha", str(toys.ALPHA),
             "--temperature", str(toys.TEMPERATURE), "--biases", str(project / "biases.pt"),
             "--all-tasks", "-o", str(tmp_path)]  # fmt: skip
    result = CliRunner().invoke(cli, ["merge", *words])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "task2" / "config.json").read_text())
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    for task in range(toys.TASKS):
        with MergedRunner(tmp_path / f"task{task}") as merged:
            found = merged.infer({"input_ids": IDS})["logits"]
        np.testing.assert_allclose(found, expected(project, task), rtol=0, atol=2e-5)
    tasks = np.array([2, 0, 3, 1])
    with OracleRunner(bound_project(project, project / "biases.pt"), "fp64") as oracle:
        mixed = oracle.infer({"input_ids": IDS, "task_ids": tasks})["logits"]
    for row, task in enumerate(tasks):
        np.testing.assert_allclose(mixed[row], expected(project, int(task))[row], atol=1e-11)


def test_the_file_is_part_of_what_the_checkpoint_is(project: Path) -> None:
    """Hash and notes change with it, so that results without the biases are not kept."""
    plain = open_checkpoint(project / "run")
    biased = open_checkpoint(project / "run", biases=project / "biases.pt")
    assert biased.sha256 != plain.sha256
    assert any("biases.pt" in note for note in biased.notes)
    assert not any("leave it out" in note for note in biased.notes)


BAD: dict[str, dict[str, Array]] = {
    "another module": {"model.layers.1.self_attn.q_proj.bias": np.ones(HIDDEN, np.float32)},
    "a weight": {f"{Q}.weight": np.ones((HIDDEN, HIDDEN), np.float32)},
    "integers": {f"{Q}.bias": np.ones(HIDDEN, np.int64)},
    "a matrix": {f"{Q}.bias": np.ones((HIDDEN, 1), np.float32)},
    "nothing": {},
}


@pytest.mark.parametrize("name", BAD)
def test_other_contents_are_refused(project: Path, tmp_path: Path, name: str) -> None:
    """Only biases of adapted modules may be in the file; others are named."""
    file = toys.write(tmp_path / "biases.pt", BAD[name])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(project / "run", biases=file)
    assert_whole(
        caught.value, where="biases.pt", found=next(iter(BAD[name]), "nothing"), expected="bias [O]"
    )


def test_a_missing_file_is_refused(project: Path) -> None:
    """The option is named."""
    with pytest.raises(UsageError) as caught:
        open_checkpoint(project / "run", biases=project / "nowhere.pt")
    assert_whole(caught.value, where="--biases", found="no such file")


def test_wrong_length_is_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    """A bias must be as long as its layer is wide."""
    file = toys.write(tmp_path / "biases.pt", {f"{Q}.bias": np.ones(5, np.float32)})
    with pytest.raises(BaseModelError, match=r"q_proj.bias' is \[12\], the adapter's is \[5\]"):
        bound_project(project, file)


def test_a_class_without_a_switch_is_refused(project: Path, tmp_path: Path) -> None:
    """Nowhere to put a bias: the reason and the way out are named."""
    base = tmp_path / "base"
    base.mkdir()
    for file in (project / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(BaseModelError) as caught:
        bound_project(project, project / "biases.pt", base)
    assert_whole(caught.value, where="base", found="no place for", expected="config switch")
