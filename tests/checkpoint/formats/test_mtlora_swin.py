from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.checkpoint import Checkpoint
from mtl_export.checkpoint.convert import write_checkpoint
from mtl_export.checkpoint.formats.mtlora_swin import FORKS
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import AdapterError, CheckpointError, IntegrityError, UsageError
from tests.checkpoint import mtlora_toys as toys
from tests.checkpoint.messages import assert_whole
from tests.checkpoint.own_toys import assert_same
from tests.fixtures.folder import FIXTURES, needs

FIXTURE = FIXTURES / "mtlora" / "matrix"
FILE = "ckpt_epoch_12.pth"
LAST = "backbone.layers.1.blocks.1.mlp.fc2"


def opened(folder: Path, *arguments: Any, **given: Any) -> Checkpoint:
    """Return a toy checkpoint, written to ``folder`` and read back."""
    return open_checkpoint(toys.write(folder / FILE, *arguments), **given)


def test_a_checkpoint_is_recognised_and_understood(tmp_path: Path) -> None:
    """Format, tasks in training order, roles, and scales as they are, never divided by r."""
    checkpoint = opened(tmp_path)
    assert (checkpoint.format, checkpoint.family) == ("mtlora", "mtlora_swin")
    assert tuple(task.name for task in checkpoint.tasks) == toys.TASKS
    layer = checkpoint.layers[LAST]
    assert dict(layer.hyper) == {
        "mode": 0.0, "shared_scale": 0.5, "task_scale_0": 0.75, "task_scale_1": 2.5,
    }  # fmt: skip
    tensors = toys.state()
    for role, key in (
        ("shared_down", "lora_shared_A"), ("shared_up", "lora_shared_B"),
        ("task_down_0", "lora_tasks_A.semseg"), ("task_up_1", "lora_tasks_B.sal"),
    ):  # fmt: skip
        np.testing.assert_array_equal(layer.tensors[role].numpy(), tensors[f"{LAST}.{key}"].numpy())
    assert dict(checkpoint.layers["backbone.layers.0.blocks.0.attn.qkv"].hyper) == {
        "mode": 0.0, "shared_scale": 1.0,
    }  # fmt: skip
    np.testing.assert_array_equal(
        checkpoint.replaced[f"{LAST}.weight"].numpy(), tensors[f"{LAST}.linear.weight"].numpy()
    )
    assert "semseg: 3 output channels, head hrnet" in checkpoint.notes


def test_the_folder_of_the_run_is_enough(tmp_path: Path) -> None:
    """A folder with one checkpoint is that checkpoint; with two, one must be named."""
    toys.write(tmp_path / FILE)
    assert open_checkpoint(tmp_path).sha256 == open_checkpoint(tmp_path / FILE).sha256
    toys.write(tmp_path / "ckpt_epoch_2.pth")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert_whole(caught.value, where=str(tmp_path), found=f"ckpt_epoch_2.pth, {FILE}")


def fates(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return the ledger by tensor."""
    return {entry.tensor: (entry.fate, entry.reason) for entry in checkpoint.ledger}


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
@pytest.mark.parametrize("intermediate", [False, True])
def test_the_ledger_lists_every_tensor_and_the_dead_ones(
    tmp_path: Path, mode: str, intermediate: bool
) -> None:
    """Every key has a fate; which reach no output depends on the mode."""
    tensors = toys.state(mode=mode, intermediate=intermediate)
    ledger = fates(opened(tmp_path, tensors, toys.config(SHARED_MODE=mode)))
    assert ledger.keys() == tensors.keys() | {"optimizer", "epoch"}
    dead = {name for name, (fate, reason) in ledger.items() if fate == "known-dead" and reason}
    dead -= {"optimizer", "epoch"}
    expected = {name for name in tensors if name.endswith("num_batches_tracked")}
    if mode == "matrix":
        expected |= {f"{LAST}.lora_shared_A", f"{LAST}.lora_shared_B"}
    if mode == "addition":
        expected |= {f"{LAST}.lora_norm.weight", f"{LAST}.lora_norm.bias"}
    elif intermediate:
        expected |= {n for n in tensors if ".blocks.0." in n and "lora_tasks" in n}
    assert dead == expected


def test_exporting_is_refused_with_the_reason(tmp_path: Path) -> None:
    """There is no normal form; the message says why and what does work."""
    with pytest.raises(AdapterError) as caught:
        read_adapters(opened(tmp_path))
    assert_whole(caught.value, where="backbone.layers.0", found="no weight per layer and task")
    assert "--checkpoint" in caught.value.fix


class Shell:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        """Ask for ``os.mkdir``."""
        return os.mkdir, (str(self.mark),)


def test_a_file_that_asks_for_more_is_refused_and_named(tmp_path: Path) -> None:
    """Code in the pickle is an integrity error, and does not run."""
    toys.write(tmp_path / FILE, scaler=Shell(tmp_path / "ran"))
    with pytest.raises(IntegrityError, match=r"(posix|os) mkdir"):
        open_checkpoint(tmp_path / FILE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "key",
    [
        f"{LAST}.shared_log_m",
        f"{LAST}.lora_shared_A_groups.dense",
        f"{LAST}.lora_rank_extractors.gate.weight",
        f"{LAST}.lora_route.weight",
        "backbone.layers.0.blocks.0.attn.qkv.q.linear.weight",
        "backbone.layers.0.blocks.0.attn.proj.linear.linear.weight",
        f"{LAST}.lora_A",
    ],
)
def test_forks_are_refused_by_their_keys(tmp_path: Path, key: str) -> None:
    """A fork's checkpoint is not read as if it were the original's."""
    with pytest.raises(AdapterError) as caught:
        opened(tmp_path, toys.state() | {key: torch.ones(2)})
    assert_whole(caught.value, where=FILE, found=key)
    assert caught.value.expected.partition("because ")[2] in {reason for _, reason in FORKS}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({f"{LAST}.lora_extra": torch.ones(2)}, "unknown tensors"),
        ({"head.weight": torch.ones(2)}, "'head.weight'"),
        ({f"{LAST}.lora_tasks_A.depth": torch.ones(1, 8)}, "lora_tasks_A.depth"),
        ({f"{LAST}.lora_shared_B": torch.ones(8, 4)}, f"{LAST}: (3, 16)"),
        ({f"{LAST}.lora_tasks_B.sal": None}, f"{LAST} lacks task_down_1 or task_up_1"),
        ({f"{LAST}.lora_shared_A": None}, f"{LAST} lacks shared_down"),
        ({f"{LAST}.lora_norm.weight": torch.ones(8)}, f"{LAST} has a lora_norm"),
        ({f"{LAST}.linear.weight": None}, "linear.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], found: str
) -> None:
    """One tensor too many, too few or misshapen is refused by name."""
    tensors = {k: v for k, v in (toys.state() | changes).items() if v is not None}
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tensors)
    assert_whole(caught.value, where=FILE, found=found)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"SHARED_MODE": "sum"}, "SHARED_MODE 'sum'"),
        ({"SPLIT_QKV": True}, "SPLIT_QKV"),
        ({"SHARED_SCALE": [1.0, 2.0]}, "SHARED_SCALE [1.0, 2.0]"),
        ({"SHARED_SCALE": "4"}, "SHARED_SCALE '4'"),
        ({"SCALE_PER_TASK_LIST": [{"sal": 1.0}, {}, {}, {}]}, "scale of sal"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    """A mode or scale that is unknown is refused, never guessed."""
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, toys.state(), toys.config(**changes))
    assert_whole(caught.value, where=FILE, found=found)


def test_a_state_dict_with_the_users_yaml_is_read(tmp_path: Path) -> None:
    """Shorthands count for all stages, TASK_SCALE for nothing, and the tasks are asked for."""
    torch.save(toys.state(), tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"no config\.json or cfg\.yaml beside it"):
        open_checkpoint(tmp_path)
    (tmp_path / "cfg.yaml").write_text(
        "MODEL:\n  MTLORA:\n    SHARED_SCALE: [2.5]\n    TASK_SCALE: [9.0]\n"
        "    SCALE_PER_TASK:\n      sal: 3.5\n"
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "--tasks sal,semseg" in caught.value.fix
    checkpoint = open_checkpoint(tmp_path, task_names=["semseg", "sal"])
    assert dict(checkpoint.layers[LAST].hyper) == {
        "mode": 0.0, "shared_scale": 2.5, "task_scale_0": 2.5, "task_scale_1": 3.5,
    }  # fmt: skip
    with pytest.raises(UsageError):
        open_checkpoint(tmp_path, task_names=["semseg", "depth"])


def test_the_order_of_training_is_not_overruled(tmp_path: Path) -> None:
    """The configuration lists the tasks; another order is refused."""
    with pytest.raises(UsageError, match="trained as semseg,sal"):
        opened(tmp_path, task_names=list(toys.TASKS)[::-1])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """A file that lost its end is broken, not a crash."""
    file = toys.write(tmp_path / FILE)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(CheckpointError):
        open_checkpoint(file)


def test_it_is_kept_bit_for_bit_in_our_own_folder(tmp_path: Path) -> None:
    """Converted and read back, no tensor or number is lost."""
    checkpoint = opened(tmp_path)
    write_checkpoint(tmp_path / "own", checkpoint)
    assert_same(open_checkpoint(tmp_path / "own"), checkpoint)


@needs("mtlora")[0]
@needs("mtlora")[1]
def test_the_trainers_own_file_is_read() -> None:
    """A file of the real trainer: every key it lists has a fate, and the scales are its own."""
    checkpoint = open_checkpoint(FIXTURE)
    keys = {line.split("\t")[0] for line in (FIXTURE / "keys.txt").read_text().splitlines()}
    ledger = fates(checkpoint)
    training = {"optimizer", "lr_scheduler", "max_accuracy", "scaler", "epoch"}
    assert ledger.keys() == keys | training
    assert [task.name for task in checkpoint.tasks] == ["semseg", "normals", "sal", "human_parts"]
    last = "backbone.layers.3.blocks.1.mlp.fc2"
    assert {n for n in keys if ledger[n][0] == "known-dead" and "lora" in n} == {
        f"{last}.lora_shared_A", f"{last}.lora_shared_B",
    }  # fmt: skip
    assert dict(checkpoint.layers["backbone.layers.2.blocks.3.mlp.fc1"].hyper) == {
        "mode": 0.0, "shared_scale": 0.75, "task_scale_0": 1.0, "task_scale_1": 1.25,
        "task_scale_2": 0.5, "task_scale_3": 0.75,
    }  # fmt: skip


def test_only_files_are_checkpoints(tmp_path: Path) -> None:
    """A folder, a pipe and a link to nothing of such a name are none, and are not opened."""
    (tmp_path / "ckpt_epoch_1.pth").mkdir()
    os.mkfifo(tmp_path / "ckpt_epoch_2.pth")
    (tmp_path / "ckpt_epoch_3.pth").symlink_to("absent")
    with pytest.raises(CheckpointError, match="no known checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="a device or a pipe"):
        open_checkpoint(tmp_path / "ckpt_epoch_2.pth")
