from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.normal_form import AdapterSet, Factors, LayerAdapter, OwnAdapter
from mtl_export.checkpoint.checkpoint import Checkpoint, LayerTensors, Readout
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import AdapterError
from mtl_export.merge.peft_folders import write_peft_folders
from tests.adapters import toys
from tests.checkpoint.messages import assert_whole
from tests.factories import HEAD_MODULE, TASKS, toy_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    """Return the toy MTL-LoRA checkpoint."""
    return open_checkpoint(toy_checkpoint(tmp_path / "adapter", learn_scale=True))


def test_every_task_is_a_low_rank_folder_with_the_same_deltas(
    tmp_path: Path, source: Checkpoint
) -> None:
    """Read back, each folder's s B A is the task's delta, rounded to float32 once per factor."""
    adapters = read_adapters(source)
    write_peft_folders(tmp_path, source, adapters)
    for task in TASKS:
        found = open_checkpoint(tmp_path / task.name)
        assert (found.format, found.family) == ("peft", "lora")
        single = read_adapters(found)
        assert sorted(single.layers) == sorted(adapters.layers)
        for module, layer in single.layers.items():
            expected = adapters.layers[module].delta(task.index)
            np.testing.assert_allclose(
                layer.delta(0), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
            )
        head = adapters.heads[HEAD_MODULE][task.index]
        np.testing.assert_array_equal(single.heads[HEAD_MODULE][0].weight, head.weight)
        np.testing.assert_array_equal(single.heads[HEAD_MODULE][0].bias, head.bias)


def test_the_config_makes_pefts_own_factor_one(tmp_path: Path, source: Checkpoint) -> None:
    """Alpha equals r, and everything else is PEFT's plain LoRA."""
    write_peft_folders(tmp_path, source, read_adapters(source))
    config = json.loads((tmp_path / "spam" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    assert config["r"] == config["lora_alpha"] == 3
    assert config["modules_to_save"] == ["classifier"]
    assert config["target_modules"] == sorted(source.layers)
    assert not any(config[flag] for flag in ("use_dora", "use_rslora", "fan_in_fan_out"))


def own_set(model_class: str = "RobertaForSequenceClassification") -> AdapterSet:
    """Return two tasks with unequal ranks and targets."""
    generator = np.random.default_rng(0)

    def block(rank: int) -> Factors:
        return Factors(
            generator.normal(size=(rank, 4)), 2.0 * np.eye(rank), generator.normal(size=(6, rank))
        )

    layers = {
        "roberta.a.1.dense": OwnAdapter("roberta.a.1.dense", 4, 6, (block(1), block(3))),
        "roberta.a.11.dense": OwnAdapter("roberta.a.11.dense", 4, 6, (block(2), None)),
    }
    return AdapterSet("lora", toys.TASKS[:2], MappingProxyType(layers), {}, model_class, "")


def test_unequal_ranks_and_targets_become_patterns(tmp_path: Path, source: Checkpoint) -> None:
    """Each task's folder has its own targets; a smaller rank keeps factor one."""
    adapters = own_set()
    write_peft_folders(tmp_path, source, adapters)
    config = json.loads((tmp_path / "sentiment" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {"roberta.a.1.dense": 1}
    for task in adapters.tasks:
        single = read_adapters(open_checkpoint(tmp_path / task.name))
        for module, layer in adapters.layers.items():
            if layer.factors(task.index) is None:
                assert module not in single.layers
            else:
                np.testing.assert_allclose(
                    single.layers[module].delta(0), layer.delta(task.index), atol=1e-5
                )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("gain", "rescaled outputs (toy)"),
        ("bias", "trained biases (toy)"),
        ("replaced", "trained base tensors (norm.bias)"),
        ("readout", "a head that no transformers class has"),
        ("embedding", "adapted embeddings (toy)"),
    ],
)
def test_what_plain_lora_cannot_hold_is_refused(
    tmp_path: Path, source: Checkpoint, change: str, found: str
) -> None:
    """The reason is named, with the format that holds it; nothing is written."""
    ones = np.ones((1, 6))
    layer = LayerAdapter("toy", np.ones((1, 4)), np.ones((1, 1, 1)), np.ones((6, 1)))
    if change == "gain":
        layer = replace(layer, gain=ones)
    if change == "bias":
        layer = replace(layer, bias=ones)
    adapters = AdapterSet("lora", toys.TASKS[:1], {"toy": layer}, {}, "BertModel", "")
    if change == "replaced":
        adapters = replace(adapters, replaced={"norm.bias": np.ones(3)})
    if change == "readout":
        source = replace(source, readouts=(Readout("first", ()),))
    if change == "embedding":
        source = replace(source, layers={"toy": LayerTensors("toy", {}, {}, embedding=True)})
    with pytest.raises(AdapterError) as caught:
        write_peft_folders(tmp_path / "out", source, adapters)
    assert_whole(caught.value, where=str(source.path), found=found)
    assert "--convert-format" in caught.value.fix
    assert not (tmp_path / "out").exists()
