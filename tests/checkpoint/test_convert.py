"""Every format as our own folder: nothing lost or asked for again, every key accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, Task
from mtl_export.checkpoint.convert import with_base, write_checkpoint
from mtl_export.checkpoint.formats.own_folder import CONFIG_FILE, WEIGHTS_FILE, store_checkpoint
from mtl_export.checkpoint.reader import open_checkpoint
from tests.adapters import toys
from tests.checkpoint import mtlora_toys, official_toys
from tests.checkpoint.official_toys import Drawer
from tests.checkpoint.own_toys import assert_same, checkpoint_of, with_members
from tests.factories import toy_checkpoint
from tests.fixtures.folder import FIXTURES, needs

NUMBERS = {"alpha": 5.0, "temperature": 0.6}


def official(make: Callable[..., Any], **options: Any) -> Callable[[Path], Path]:
    """Return a writer of an official checkpoint of one class."""

    def write(folder: Path) -> Path:
        fused = make is official_toys.mtl_lora_fused
        modules = official_toys.FUSED_MODULES if fused else official_toys.MODULES
        states = {
            module: make(
                Drawer(seed, "BF16" if "bf16" in folder.name else "F32"), *shape, **options
            )
            for seed, (module, shape) in enumerate(modules.items())
        }
        official_toys.write(
            folder / "checkpoint" / "final_checkpoint.pt", official_toys.flat(states, "module.")
        )
        return folder

    return write


def in_memory(checkpoint: Checkpoint) -> Callable[[Path], Path]:
    """Return a writer of our own folder."""

    def write(folder: Path) -> Path:
        store_checkpoint(folder, checkpoint)
        return folder

    return write


def mtlora(folder: Path) -> Path:
    """Write an MTLoRA checkpoint."""
    folder.mkdir()
    return mtlora_toys.write(folder / "ckpt_epoch_3.pth")


def half_known(folder: Path) -> Path:
    """Write a folder of ours that lacks alpha and temperature."""
    toys.write_checkpoint(
        folder,
        toys.checkpoint_parts(dtype="BF16") | {"alpha": None, "temperature": None},
        BaseReference(),
    )
    return folder


# name -> writer, and the numbers it lacks
CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "own": (toy_checkpoint, ()),
    "own without numbers": (half_known, ("alpha", "temperature")),
    "own with everything": (in_memory(checkpoint_of()), ()),
    "own with members": (in_memory(with_members()), ()),
    "official mtl_lora": (official(official_toys.mtl_lora), ("alpha", "temperature")),
    "official mtl_lora bf16": (
        official(official_toys.mtl_lora, diagonal=True, scaler=True),
        ("alpha", "temperature"),
    ),
    "official fused": (official(official_toys.mtl_lora_fused), ("alpha", "temperature")),
    "official moe_lora": (official(official_toys.moe_lora), ("alpha",)),
    "official multi_lora": (official(official_toys.multi_lora, scaler=True), ("alpha",)),
    "official lora": (official(official_toys.lora), ("alpha",)),
    "official dora": (official(official_toys.dora), ("alpha",)),
    "mtlora": (mtlora, ()),
}  # fmt: skip


def keys_in(path: Path) -> set[str]:
    """Return every tensor's key in the files of a checkpoint, below their folders' names."""
    if path.is_file():
        loaded = torch.load(path, weights_only="ckpt_epoch" not in path.name)
        return {key.replace("module.", "") for key in loaded}
    found = set()
    for file in path.rglob("*.*"):
        if file.suffix == ".safetensors":
            folder = file.parent.relative_to(path).as_posix()
            with safe_open(str(file), framework="numpy") as handle:
                found |= {f"{folder}/{key}".removeprefix("./") for key in handle.keys()}  # noqa: SIM118
        elif file.suffix == ".pt":
            found |= keys_in(file)
    return found


@pytest.mark.parametrize("case", list(CASES))
def test_every_format_becomes_our_own_without_loss(tmp_path: Path, case: str) -> None:
    """Bit for bit the same, needing no flag any more; converting twice gives the same bytes."""
    write, lacks = CASES[case]
    source = write(tmp_path / case)
    known = {name: NUMBERS[name] for name in lacks}
    checkpoint = open_checkpoint(
        source, alpha=known.get("alpha"), temperature=known.get("temperature")
    )
    write_checkpoint(tmp_path / "own", checkpoint)
    again = open_checkpoint(tmp_path / "own")
    assert_same(again, checkpoint)
    write_checkpoint(tmp_path / "twice", again)
    for file in (f for f in (tmp_path / "own").rglob("*") if f.is_file()):
        twin = tmp_path / "twice" / file.relative_to(tmp_path / "own")
        assert file.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize("case", [name for name in CASES if name != "mtlora"])
def test_the_ledger_covers_exactly_the_stored_keys(tmp_path: Path, case: str) -> None:
    """Every key of the files has one fate, and no other key has (MTLoRA: see its own test)."""
    source = CASES[case][0](tmp_path / case)
    entries = [entry.tensor for entry in open_checkpoint(source).ledger]
    assert sorted(entries) == sorted(keys_in(source))


@pytest.mark.parametrize("folder", ["adapterhub/minilm_static/setup", "peft/tasks", "peft/multi"])
@needs("peft")[0]
@needs("peft")[1]
def test_other_libraries_folders_become_our_own(tmp_path: Path, folder: str) -> None:
    """Real folders of one adapter per task: converted without loss, every key in the ledger."""
    source = FIXTURES / folder
    names = None
    if folder.startswith("peft"):
        names = sorted(child.name for child in source.iterdir() if child.is_dir())
    checkpoint = open_checkpoint(source, task_names=names)
    write_checkpoint(tmp_path / "own", checkpoint)
    assert_same(open_checkpoint(tmp_path / "own"), checkpoint)
    assert len({entry.tensor for entry in checkpoint.ledger}) == len(checkpoint.ledger)
    stored = 0
    for file in (f for task in checkpoint.tasks for f in (source / task.name).iterdir()):
        if file.suffix == ".bin":
            stored += len(torch.load(file, weights_only=True))
        elif file.suffix == ".safetensors":
            with safe_open(str(file), framework="numpy") as handle:
                stored += len(handle.keys())
    assert len(checkpoint.ledger) == stored


def test_the_base_is_written_in() -> None:
    """Hash and class come from the base; its name only where the checkpoint has none."""
    for checkpoint in (checkpoint_of(), with_members()):
        found = with_base(checkpoint, BaseReference("./here", "ef" * 32), "BertModel")
        assert found.base == BaseReference("toy/base", "ef" * 32)
        assert all(member.base == found.base for member in found.members)
    official_like = with_base(
        replace(checkpoint_of(), base=BaseReference()),
        BaseReference("./here", "ef" * 32),
        "LlamaForCausalLM",
    )
    assert official_like.base.id == "./here"
    assert official_like.model_class == "LlamaForCausalLM"


def test_a_headless_task_needs_no_head(tmp_path: Path) -> None:
    """Tasks without labels and without heads are kept so."""
    tasks = tuple(Task(name, index) for index, name in enumerate("abc"))
    parts = toys.checkpoint_parts() | {"heads": {}, "tasks": tasks}
    toys.write_checkpoint(tmp_path / "a", parts, BaseReference())
    write_checkpoint(tmp_path / "b", open_checkpoint(tmp_path / "a"))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
