from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.reader import FORMATS, open_checkpoint
from mtl_export.errors import CheckpointError, IntegrityError, UsageError
from tests.checkpoint.messages import assert_whole
from tests.factories import TASKS, edit_config, edit_numbers, toy_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a toy checkpoint that names no base."""
    return toy_checkpoint(tmp_path / "adapter")


def test_our_own_folder_is_recognised(folder: Path) -> None:
    """A folder in our format is opened by its reader."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "mtl-export"
    assert checkpoint.path == folder
    assert checkpoint.tasks == TASKS


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    """A missing checkpoint is a mistake in the command."""
    with pytest.raises(UsageError) as caught:
        open_checkpoint(tmp_path / "gone")
    assert_whole(caught.value, where="gone", found="no such file", expected="checkpoint")
    assert "--checkpoint" in caught.value.fix


@pytest.mark.parametrize("content", ["{}", '{"format": "other"}'])
def test_a_folder_of_an_unknown_kind_lists_what_it_holds(tmp_path: Path, content: str) -> None:
    """When no format fits, the message says what is there and what each format looks for."""
    (tmp_path / "adapter_config.json").write_text(content, encoding="latin-1")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert_whole(
        caught.value, where=str(tmp_path), found="adapter_config.json, notes.txt",
        expected=FORMATS[0].looks_for,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("", "an empty file"), ("\xff", "not UTF-8"), ("[]", "no JSON object")],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "spam/adapter_config.json"])
def test_a_config_that_is_not_json_is_named(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    """No format takes it for its own, and what is wrong is not that none is known."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert_whole(caught.value, where=name, found=said, expected="JSON object")


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    """A file that is no checkpoint is refused by name, with what would be one."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "notes.txt")
    assert_whole(
        caught.value, where="notes.txt", found="no known checkpoint; it holds notes.txt",
        expected=FORMATS[0].looks_for,
    )  # fmt: skip


class RunsCode:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Ask the unpickler to call ``os.system``."""
        return os.system, ("false",)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_pickle_with_code_is_an_integrity_error(tmp_path: Path, whole_folder: bool) -> None:
    """A pickle that asks to run code is refused as such, not as an unknown kind."""
    file = tmp_path / "adapter.pt"
    file.write_bytes(pickle.dumps({"weight": RunsCode()}))
    with pytest.raises(IntegrityError) as caught:
        open_checkpoint(tmp_path if whole_folder else file)
    assert_whole(caught.value, where=str(file), found="system", expected="tensors")


@pytest.mark.parametrize("option", ["alpha", "temperature"])
def test_a_number_the_checkpoint_lacks_is_taken_from_the_command(folder: Path, option: str) -> None:
    """--alpha and --temperature fill in what is null, and only that."""
    edit_numbers(folder, **{option: None})
    assert all(option not in layer.hyper for layer in open_checkpoint(folder).layers.values())
    given: dict[str, Any] = {option: 0.125}
    for layer in open_checkpoint(folder, **given).layers.values():
        assert layer.hyper[option] == 0.125
        assert set(layer.hyper) == {"alpha", "temperature"}


@pytest.mark.parametrize(("option", "own"), [("alpha", 5.0), ("temperature", 0.7)])
def test_a_number_the_checkpoint_carries_is_not_overruled(
    folder: Path, option: str, own: float
) -> None:
    """Another value than the trained one is refused; the same one is fine."""
    same: dict[str, Any] = {option: own}
    assert next(iter(open_checkpoint(folder, **same).layers.values())).hyper[option] == own
    other: dict[str, Any] = {option: own + 1}
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder, **other)
    assert_whole(
        caught.value, where=f"--{option} {own + 1:g}", found=f"{own:g}", expected="the same"
    )
    assert caught.value.fix == f"Leave out --{option}"


def placeholders(folder: Path) -> None:
    """Give the checkpoint's three tasks the names of one that carries none."""
    edit_config(
        folder,
        tasks=[{"name": f"task{t.index}", "labels": list(t.labels), "kind": t.kind} for t in TASKS],
    )


def test_placeholder_names_are_replaced_in_id_order(folder: Path) -> None:
    """--tasks names the tasks of a checkpoint that has only task0, task1, task2."""
    placeholders(folder)
    names = ["sport", "arts", "law"]
    checkpoint = open_checkpoint(folder, task_names=names)
    assert [task.name for task in checkpoint.tasks] == names
    assert [task.index for task in checkpoint.tasks] == [0, 1, 2]
    assert [task.labels for task in checkpoint.tasks] == [task.labels for task in TASKS]
    own = open_checkpoint(folder).heads["classifier"]
    for head, before in zip(checkpoint.heads["classifier"], own, strict=True):
        assert head is not None
        assert before is not None
        assert head.weight.name == before.weight.name


def test_too_few_names_are_refused(folder: Path) -> None:
    """Two names for three tasks are refused with the count."""
    placeholders(folder)
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder, task_names=["a", "b"])
    assert_whole(caught.value, where="--tasks a,b", found="3 tasks", expected="3 names")


def test_names_the_checkpoint_carries_are_not_overruled(folder: Path) -> None:
    """Other names, or the same in another order, would swap tasks: refused."""
    own = [task.name for task in TASKS]
    assert open_checkpoint(folder, task_names=own).tasks == TASKS
    for names in (own[::-1], ["a", "b", "c"], own[:2]):
        with pytest.raises(UsageError) as caught:
            open_checkpoint(folder, task_names=names)
        assert_whole(caught.value, where="--tasks", found=own[0], expected="the same ones")


def test_bad_names_are_refused(folder: Path) -> None:
    """A name that is no folder name is refused whatever the checkpoint says."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, task_names=["a", "a", "../c"])
    assert_whole(caught.value, where="--tasks", found="'../c'", expected="each different")
