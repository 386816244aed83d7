"""AdapterHub checkpoints: whole models, and what is broken or not supported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import (
    AdapterError,
    BaseModelError,
    CheckpointError,
    MtlExportError,
)
from tests.checkpoint import adapterhub_toys as hub
from tests.checkpoint.messages import assert_whole
from tests.factories import HIDDEN, toy_base

QUERY = "bert.encoder.layer.0.attention.self.query"
ADAPTER_BIN = "pytorch_adapter.bin"
CONFIG = "adapter_config.json"


REFUSALS: dict[str, tuple[type[MtlExportError], str, dict[str, Any]]] = {
    "gating": (AdapterError, "use_gating", {"use_gating": True}),
    "full Lambda": (AdapterError, "'linear'", {"task_specific_matrix_type": "linear"}),
    "DoRA": (AdapterError, "MTL-LoRA with use_dora", {"use_dora": True}),
    "VeRA": (AdapterError, "VeRA", {"vera_d": 0.1}),
    "DVoRA": (AdapterError, "VeRA or DVoRA", {"vera_b": 0.1, "architecture": "lora"}),
    "union": (AdapterError, "architecture 'union'", {"architecture": "union"}),
    "prefix": (AdapterError, "'prefix_tuning'", {"architecture": "prefix_tuning"}),
    "scaled": (AdapterError, "composition_mode 'scale'", {"composition_mode": "scale"}),
    "scaled LoRA": (AdapterError, "no (IA)^3",
                    {"composition_mode": "scale", "architecture": "lora"}),
    "no alpha": (CheckpointError, "alpha is None", {"alpha": None}),
    "tau zero": (CheckpointError, "weights_sharpness is 0", {"weights_sharpness": 0}),
    "another rank": (CheckpointError, "with r = 4", {"r": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_supported_is_refused_with_its_reason(tmp_path: Path, case: str) -> None:
    """Each refusal says what it found, why, and what to do instead."""
    kind, found, changes = REFUSALS[case]
    folder = hub.write_mtl(tmp_path / "a", config=changes)
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where="zeta", found=found)
    assert caught.value.expected


def broken(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """Return a maker of a checkpoint with one thing broken."""

    def make(folder: Path) -> Path:
        hub.write_mtl(folder)
        change(folder)
        return folder

    return make


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the adapter file of one task."""
    file = folder / ADAPTER_BIN
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


BREAKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a tensor too many": (
        broken(lambda f: resave(f / "task1", lambda s: s.update(stray=torch.ones(2)))),
        "unknown 'stray'",
    ),
    "a tensor missing": (
        broken(lambda f: resave(f / "task1", lambda s: s.pop(f"{QUERY}.loras.task1.weights"))),
        f"missing {QUERY}.loras.task1.weights",
    ),
    "no weights": (
        broken(lambda f: (f / "task1" / ADAPTER_BIN).unlink()),
        "neither adapter.safetensors nor pytorch_adapter.bin",
    ),
    "both kinds of weights": (
        broken(lambda f: hub.write_state(f / "task1", "pytorch_adapter",
                                         hub.mtl_states()["task1"], is_safetensors=True)),
        "both adapter.safetensors and pytorch_adapter.bin",
    ),
    "no folder": (broken(lambda f: shutil.rmtree(f / "task1")), "no adapter_config.json"),
    "half a head": (
        broken(lambda f: (f / "task1" / "head_config.json").unlink()),
        "only one of head_config.json",
    ),
    "labels": (
        broken(lambda f: hub.edit_json(f / "task1" / "head_config.json", label2id={"a": 0})),
        "label2id numbers 1 labels",
    ),
    "layers": (
        broken(lambda f: hub.edit_json(f / "task1" / "head_config.json", layers=3)),
        f"weights [({HIDDEN}, {HIDDEN}), (4, {HIDDEN})]",
    ),
    "a stack": (broken(lambda f: hub.write_setup(f, hub.NAMES, "Stack")), "setup is Stack"),
    "another class": (
        broken(lambda f: hub.edit_json(f / "task1" / CONFIG, model_class="RobertaAdapterModel")),
        "task1 of RobertaAdapterModel",
    ),
    "a preset": (
        broken(lambda f: hub.edit_json(f / "task1" / CONFIG, config="seq_bn")), "'seq_bn'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_what_is_broken_is_refused(tmp_path: Path, case: str) -> None:
    """Nothing is guessed where files are missing or contradict each other."""
    make, found = BREAKS[case]
    folder = make(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where=str(folder), found=found)


def write_whole(folder: Path, base: Path, *, changed: str = "") -> Path:
    """Write what ``save_pretrained`` writes: everything in one file, tied copies included."""
    from safetensors.torch import load_file

    state = {f"bert.{key}": value for key, value in load_file(base / "model.safetensors").items()}
    state["bert.prompt_tuning.base_model_embeddings.weight"] = state[
        "bert.embeddings.word_embeddings.weight"
    ]
    heads = {}
    for index, (name, own) in enumerate(hub.mtl_states().items()):
        heads[name] = hub.head_config(hub.LABELS[index])
        flexible = hub.head_state(name, heads[name], index)
        state |= {key: torch.from_numpy(value) for key, value in {**own, **flexible}.items()}
    for module in hub.MODULES:
        for key in ("lora_A", "lora_B"):
            shared = f"{module}.shared_parameters.{','.join(hub.NAMES)}.{key}"
            state[shared] = state[f"{module}.loras.zeta.{key}"]
    if changed:
        state[changed] = state[changed] * 2
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    adapters = {name: "hash" for name in sorted(hub.NAMES)}
    config = {
        "architectures": ["BertAdapterModel"], "model_type": "bert", "prediction_heads": heads,
        "adapters": {"adapters": adapters, "config_map": {"hash": hub.MTL_CONFIG}},
    }  # fmt: skip
    hub.write_json(folder / "config.json", config)
    return folder


def test_a_whole_model_is_its_adapters(tmp_path: Path) -> None:
    """A whole model in one pickle has the same deltas and heads as the folders per task."""
    base = toy_base(tmp_path / "base")
    folder = write_whole(tmp_path / "whole", base)
    with pytest.raises(CheckpointError, match=r"names in config\.json alone do not keep"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, task_names=hub.NAMES)
    found = read_adapters(checkpoint)
    expected = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    for module, layer in expected.layers.items():
        for index in range(3):
            np.testing.assert_array_equal(found.layers[module].delta(index), layer.delta(index))
    for module, heads in expected.heads.items():
        for own, head in zip(found.heads[module], heads, strict=True):
            np.testing.assert_array_equal(own.weight, head.weight)
    bind(checkpoint, found, open_base(str(base)))
    keys = torch.load(folder / "pytorch_model.bin", weights_only=True).keys()
    assert sorted(entry.tensor for entry in checkpoint.ledger) == sorted(keys)


def test_a_whole_model_on_another_base_is_refused(tmp_path: Path) -> None:
    """The base inside the file and the base given must be the same, number for number."""
    base = toy_base(tmp_path / "base")
    folder = write_whole(tmp_path / "whole", base, changed="bert.pooler.dense.bias")
    checkpoint = open_checkpoint(folder, task_names=hub.NAMES)
    with pytest.raises(BaseModelError, match=r"'bert.pooler.dense.bias' has other values"):
        bind(checkpoint, read_adapters(checkpoint), open_base(str(base)))


def test_unlisted_adapters_in_a_whole_model_are_refused(tmp_path: Path) -> None:
    """A tensor of an adapter that config.json does not name has no fate."""
    folder = write_whole(tmp_path / "whole", toy_base(tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["adapters"]["adapters"]["task1"]
    hub.write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"that config.json does not list: .*loras.task1"):
        open_checkpoint(folder, task_names=("zeta", "task10"))


def test_peft_folders_are_not_ours(tmp_path: Path) -> None:
    """PEFT uses the same file name with other keys."""
    hub.write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 8})
    with pytest.raises(MtlExportError) as caught:
        open_checkpoint(tmp_path)
    assert "adapterhub" not in str(caught.value)
