"""AdapterHub checkpoints: every layout, the numbers, and the faults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import (
    CheckpointError,
    UsageError,
)
from tests.checkpoint import adapterhub_toys as hub
from tests.checkpoint.messages import assert_whole

QUERY = "bert.encoder.layer.0.attention.self.query"
ADAPTER_BIN = "pytorch_adapter.bin"
CONFIG = "adapter_config.json"


def names(checkpoint: Checkpoint) -> list[str]:
    """Return the tasks' names in id order."""
    return [task.name for task in checkpoint.tasks]


def paper_delta(
    state: hub.State,
    name: str,
    module: str,
    *,
    alpha: float = hub.ALPHA,
    tau: float = hub.TAU,
    is_averaged: bool = False,
    is_scaled: bool = True,
    is_reversed: bool = False,
) -> Array:
    """Return MTL-LoRA's delta of one module, float64, in plain loops."""
    down, up, diagonal, mixing = (
        state[f"{module}.loras.{name}.{key}"].astype(np.float64)
        for key in ("lora_A", "lora_B", "task_specific.values", "weights")
    )
    powers = [np.exp((w - max(mixing)) / tau) for w in mixing]
    shares = [1 / len(mixing) if is_averaged else power / sum(powers) for power in powers]
    diagonal = diagonal[::-1] if is_reversed else diagonal
    delta = np.zeros((up.shape[1], down.shape[1]))
    for share, one in zip(shares, up, strict=True):
        for rank in range(len(diagonal)):
            delta += share * diagonal[rank] * np.outer(one[:, rank], down[rank])
    return delta * (alpha / len(diagonal) if is_scaled else 1.0)


@pytest.mark.parametrize("is_safetensors", [False, True])
def test_a_setup_has_the_order_of_the_tasks(tmp_path: Path, is_safetensors: bool) -> None:
    """A setup folder opens by itself: order, labels, kinds, base, class."""
    folder = hub.write_mtl(tmp_path / "a", is_safetensors=is_safetensors)
    checkpoint = open_checkpoint(folder)
    assert names(checkpoint) == list(hub.NAMES)
    assert [task.labels for task in checkpoint.tasks] == [
        ("L0", "L1"),
        ("L0", "L1", "L2", "L3"),
        ("L0",),
    ]
    assert [task.kind for task in checkpoint.tasks] == [
        "single_label_classification",
        "single_label_classification",
        "regression",
    ]
    assert (checkpoint.format, checkpoint.family) == ("adapterhub", "mtl_lora")
    assert checkpoint.base.id == "toy/bert"
    assert not checkpoint.members
    assert sorted(checkpoint.layers) == sorted(hub.MODULES)
    assert checkpoint.sha256 == open_checkpoint(folder, task_names=hub.NAMES).sha256


def test_every_delta_is_the_papers(tmp_path: Path) -> None:
    """B, mixed with the stored sharpness, times the diagonal, times A, times alpha / r."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    states = hub.mtl_states()
    for module in hub.MODULES:
        for index, name in enumerate(hub.NAMES):
            expected = paper_delta(states[name], name, module)
            np.testing.assert_allclose(adapters.layers[module].delta(index), expected, atol=1e-12)


@pytest.mark.parametrize(
    "fault",
    [{"is_reversed": True}, {"tau": hub.TAU * 1.5}, {"is_averaged": True}, {"is_scaled": False}],
    ids=["Lambda in another order", "tau changed", "B averaged", "scale dropped"],
)
def test_a_wrong_formula_is_seen(tmp_path: Path, fault: dict[str, Any]) -> None:
    """Each fault moves every task's delta by far more than any tolerance."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    states = hub.mtl_states()
    for index, name in enumerate(hub.NAMES):
        wrong = paper_delta(states[name], name, QUERY, **fault)
        assert np.abs(adapters.layers[QUERY].delta(index) - wrong).max() > 1e-2


def test_permuted_tasks_are_seen(tmp_path: Path) -> None:
    """No two tasks have the same delta or head."""
    adapters = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "a")))
    layer = adapters.layers[QUERY]
    for one, other in ((0, 1), (1, 2), (2, 0)):
        assert np.abs(layer.delta(one) - layer.delta(other)).max() > 1e-2


@pytest.mark.parametrize("edit", ["weights_sharpness", "alpha"])
def test_the_config_decides_sharpness_and_scale(tmp_path: Path, edit: str) -> None:
    """Changing a number in every adapter_config.json changes the delta accordingly."""
    folder = hub.write_mtl(tmp_path / "a")
    for name in hub.NAMES:
        hub.edit_json(folder / name / CONFIG, **{edit: 0.9})
    adapters = read_adapters(open_checkpoint(folder))
    state = hub.mtl_states()["zeta"]
    expected = (
        paper_delta(state, "zeta", QUERY, alpha=0.9)
        if edit == "alpha"
        else paper_delta(state, "zeta", QUERY, tau=0.9)
    )
    np.testing.assert_allclose(adapters.layers[QUERY].delta(0), expected, atol=1e-12)


def test_half_precision_does_not_overflow(tmp_path: Path) -> None:
    """Default mixing weights at tau = 0.05 are exp(20) = Inf in half precision, not here."""
    folder = hub.write_mtl(tmp_path / "a", config={"weights_sharpness": 0.05})
    states = hub.mtl_states()
    for name in hub.NAMES:
        half = {key: value.astype(np.float16) for key, value in states[name].items()}
        for key in half:
            half[key] = np.ones_like(half[key]) if key.endswith(".weights") else half[key]
        hub.write_state(folder / name, "pytorch_adapter", half, is_safetensors=False)
        states[name] = half
    adapters = read_adapters(open_checkpoint(folder))
    expected = paper_delta(states["task1"], "task1", QUERY, tau=0.05)
    np.testing.assert_allclose(adapters.layers[QUERY].delta(1), expected, atol=1e-12)


def test_mixed_dtypes_are_normal(tmp_path: Path) -> None:
    """dtype="bfloat16" in the config casts A and B alone; each tensor is read as it is."""
    folder = hub.write_mtl(tmp_path / "a")
    state = {key: torch.from_numpy(value) for key, value in hub.mtl_states()["zeta"].items()}
    for name in hub.NAMES:
        own = {
            key.replace(".zeta.", f".{name}."): value.bfloat16() if "lora_" in key else value
            for key, value in state.items()
        }
        torch.save(own, folder / name / ADAPTER_BIN)
    layer = open_checkpoint(folder).layers[QUERY]
    assert [layer.tensors[r].dtype for r in ("down", "up", "lambda")] == ["BF16", "BF16", "F32"]


def test_folders_alone_have_lost_the_order(tmp_path: Path) -> None:
    """Without a setup file the order must be given, and is then the tasks' order."""
    folder = hub.write_mtl(tmp_path / "a", has_setup=False)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert_whole(caught.value, where=str(folder), found="no adapter_setup.json",
                 expected="the tasks in id order")  # fmt: skip
    assert "--tasks task1,task10,zeta" in caught.value.fix
    given = open_checkpoint(folder, task_names=hub.NAMES)
    assert names(given) == list(hub.NAMES)
    reference = read_adapters(open_checkpoint(hub.write_mtl(tmp_path / "b")))
    for index in range(3):
        np.testing.assert_array_equal(
            read_adapters(given).layers[QUERY].delta(index), reference.layers[QUERY].delta(index)
        )


@pytest.mark.parametrize("order", [("zeta", "task1"), ("zeta", "task1", "other")])
def test_an_order_of_other_names_is_refused(tmp_path: Path, order: tuple[str, ...]) -> None:
    """--tasks must be the folders' names."""
    folder = hub.write_mtl(tmp_path / "a", has_setup=False)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder, task_names=order)
    assert_whole(caught.value, where="--tasks", found="holds the adapters task1, task10, zeta")


def test_a_setup_is_not_overruled(tmp_path: Path) -> None:
    """--tasks in another order than the setup's contradicts it."""
    folder = hub.write_mtl(tmp_path / "a")
    with pytest.raises(UsageError, match="the checkpoint has 3 tasks: zeta, task1, task10"):
        open_checkpoint(folder, task_names=("task1", "zeta", "task10"))


def test_one_adapter_needs_no_order(tmp_path: Path) -> None:
    """A single adapter's folder, and a folder of one, are one task."""
    folder = hub.write_mtl(tmp_path / "a")
    alone = open_checkpoint(folder / "task1")
    assert names(alone) == ["task1"]
    shutil.copytree(folder / "task1", tmp_path / "b" / "mine")
    assert names(open_checkpoint(tmp_path / "b")) == ["mine"]
    expected = paper_delta(hub.mtl_states()["task1"], "task1", QUERY)
    for path in (folder / "task1", tmp_path / "b"):
        delta = read_adapters(open_checkpoint(path)).layers[QUERY].delta(0)
        np.testing.assert_allclose(delta, expected, atol=1e-12)


def test_unequal_factors_become_members(tmp_path: Path) -> None:
    """Tasks that never shared A and B are exported all the same, each with its own."""
    folder = hub.write_mtl(tmp_path / "a", is_shared=False)
    checkpoint = open_checkpoint(folder)
    assert [names(member) for member in checkpoint.members] == [["zeta"], ["task1"], ["task10"]]
    states, adapters = hub.mtl_states(is_shared=False), read_adapters(checkpoint)
    for index, name in enumerate(hub.NAMES):
        expected = paper_delta(states[name], name, QUERY)
        np.testing.assert_allclose(adapters.layers[QUERY].delta(index), expected, atol=1e-12)
    assert not [e for e in checkpoint.ledger if "equal" in e.reason]


def test_different_numbers_become_members(tmp_path: Path) -> None:
    """Equal factors with an alpha of one task's own are not one set of factors."""
    folder = hub.write_mtl(tmp_path / "a")
    hub.edit_json(folder / "task1" / CONFIG, alpha=9)
    adapters = read_adapters(checkpoint := open_checkpoint(folder))
    assert len(checkpoint.members) == 3
    expected = paper_delta(hub.mtl_states()["task1"], "task1", QUERY, alpha=9)
    np.testing.assert_allclose(adapters.layers[QUERY].delta(1), expected, atol=1e-12)


def test_every_tensor_has_a_fate(tmp_path: Path) -> None:
    """The ledger names each key of each file once, and why a dead one is dead."""
    checkpoint = open_checkpoint(hub.write_mtl(tmp_path / "a"))
    fates = {entry.tensor: entry for entry in checkpoint.ledger}
    assert len(fates) == len(checkpoint.ledger) == 3 * (4 * 4 + 12)
    key = f"{QUERY}.loras.NAME.lora_A"
    assert fates[f"zeta/{key.replace('NAME', 'zeta')}"].fate == "folded"
    copy = fates[f"task1/{key.replace('NAME', 'task1')}"]
    assert (copy.fate, copy.reason) == ("known-dead", "equal to zeta's, bit for bit")
    assert fates[f"task1/{QUERY}.loras.task1.weights"].fate == "stacked"
    assert fates["task1/heads.task1.4.bias"].fate == "head"
    assert fates["task1/heads.task10.4.bias"].reason == "another task's head, saved along"


SINGLES = {
    "lora": (hub.LORA_CONFIG, "lora"),
    "dora": (hub.DORA_CONFIG, "adapterhub_dora"),
    "ia3": (hub.IA3_CONFIG, "ia3"),
}


@pytest.mark.parametrize("kind", SINGLES)
def test_single_adapters_become_members(tmp_path: Path, kind: str) -> None:
    """LoRA, DoRA and (IA)^3 adapters of one base are tasks with factors of their own."""
    config, family = SINGLES[kind]
    for index, name in enumerate(hub.NAMES):
        hub.write_adapter(tmp_path / name, name, hub.single_state(name, config, index), config)
    checkpoint = open_checkpoint(tmp_path, task_names=hub.NAMES)
    assert {member.family for member in checkpoint.members} == {family}
    scaling = 2.0 if kind == "ia3" else hub.ALPHA / hub.RANK
    assert checkpoint.members[1].layers[QUERY.removeprefix("bert.")].hyper["scaling"] == scaling
    assert family == open_checkpoint(tmp_path / "zeta").family


@pytest.mark.parametrize(
    ("version", "scaling"),
    [
        ("adapters.0.2.1", 1.0),
        ("adapters.1.0.1", 1.0),
        ("adapters.1.1.0.dev0", 1.0),
        ("adapters.1.1.0", hub.ALPHA / hub.RANK),
        ("adapters.1.10.0", hub.ALPHA / hub.RANK),
        ("3.2.1", hub.ALPHA / hub.RANK),
        ("", hub.ALPHA / hub.RANK),
    ],
)
def test_old_versions_ignored_alpha(tmp_path: Path, version: str, scaling: float) -> None:
    """Before 1.1.0 a LoRA was trained with s = 1 whatever its config says."""
    state = hub.single_state("zeta", hub.LORA_CONFIG)
    hub.write_adapter(tmp_path / "a", "zeta", state, hub.LORA_CONFIG, version=version)
    layer = open_checkpoint(tmp_path / "a").layers[QUERY.removeprefix("bert.")]
    assert layer.hyper["scaling"] == pytest.approx(scaling)


def test_numbers_given_again_must_agree(tmp_path: Path) -> None:
    """--alpha and --temperature cannot overrule the config, of members neither."""
    shared = hub.write_mtl(tmp_path / "a")
    open_checkpoint(shared, alpha=float(hub.ALPHA), temperature=hub.TAU)
    unshared = hub.write_mtl(tmp_path / "b", is_shared=False)
    for folder in (shared, unshared):
        with pytest.raises(UsageError, match="the checkpoint itself says 5"):
            open_checkpoint(folder, alpha=9.0)
