from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.checkpoint.checkpoint import BaseReference, LayerTensors, Task
from mtl_export.checkpoint.formats import own_folder, own_folder_checks
from mtl_export.checkpoint.formats.own_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    is_own_folder,
    read_folder,
    store_checkpoint,
    write_folder,
)
from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.errors import CheckpointError
from tests.adapters import toys
from tests.checkpoint.messages import assert_whole
from tests.checkpoint.own_toys import Source, assert_same, checkpoint_of, with_members
from tests.factories import edit_config, edit_tensors


@given(
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
    rank=st.integers(1, 4),
    members=st.booleans(),
)
def test_what_is_written_is_read_back_and_written_again(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, rank: int, members: bool
) -> None:
    """Any checkpoint comes back bit for bit, and saving that gives the same bytes."""
    root = tmp_path_factory.mktemp("own")
    checkpoint = with_members(seed) if members else checkpoint_of(seed, dtype=dtype, rank=rank)
    store_checkpoint(root / "first", checkpoint)
    again = read_folder(root / "first")
    assert_same(again, checkpoint)
    store_checkpoint(root / "second", again)
    files = sorted(p.relative_to(root / "first") for p in (root / "first").rglob("*.*")
                   if p.is_file())  # fmt: skip
    assert len(files) == (5 if members else 2)
    for file in files:
        assert (root / "first" / file).read_bytes() == (root / "second" / file).read_bytes()
    assert read_folder(root / "second").sha256 == again.sha256


def test_the_docstring_documents_every_key(tmp_path: Path) -> None:
    """Exactly the documented keys, in the documented order of meaning."""
    store_checkpoint(tmp_path, checkpoint_of())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config.keys() == own_folder_checks.KEYS.keys()
    for key in config:
        assert f"\n    {key} " in (own_folder.__doc__ or "")


def test_task_names_do_not_collide(tmp_path: Path) -> None:
    """Names with dots cannot be mistaken for another task's head."""
    checkpoint = checkpoint_of()
    store_checkpoint(tmp_path, checkpoint)
    keys = {entry.tensor for entry in read_folder(tmp_path).ledger}
    assert {"heads.0.head.1.weight", "heads.1.head.1.weight"} <= keys


def test_the_hash_covers_every_file(tmp_path: Path) -> None:
    """A change in one member is another checkpoint."""
    store_checkpoint(tmp_path / "a", with_members())
    before = read_folder(tmp_path / "a").sha256
    edit_tensors(tmp_path / "a" / "members" / "tone", replaced__norm__bias=np.ones(4, np.float32))
    assert read_folder(tmp_path / "a").sha256 != before


def test_a_member_alone_is_a_checkpoint(tmp_path: Path) -> None:
    """One task's folder can be read by itself."""
    store_checkpoint(tmp_path, with_members())
    member = read_folder(tmp_path / "members" / "tone.fine")
    assert [task.name for task in member.tasks] == ["tone.fine"]


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    """Such a folder could not be read again."""
    layer = LayerTensors("b.dense", {"down": Source(0)(1, 2)}, {"alpha": float("nan")})
    with pytest.raises(CheckpointError, match="alpha = nan"):
        store_checkpoint(tmp_path / "x", replace(checkpoint_of(), layers={"b.dense": layer}))
    assert not (tmp_path / "x").exists()


BASE = BaseReference("toy/bert", "ab" * 32)
LAYER = {"roles": ["down"], "hyper": {}, "embedding": False}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"colour": 1}, "unknown 'colour'"),
        ({"members": 1}, "members is 1"),
        ({"members": True}, "members, and layers and head_modules and replaced and rows"),
        ({"tasks": [{"name": "x"}]}, "task {'name': 'x'}"),
        ({"layers": {"m": {}}}, "layer m: {}"),
        ({"layers": {"m": LAYER | {"roles": ["b", "a"]}}}, "layer m"),
        ({"layers": {"m": LAYER | {"roles": []}}}, "layer m"),
        ({"layers": {"m": LAYER | {"hyper": {"alpha": "1"}}}}, "layer m"),
        ({"layers": {"m": LAYER | {"hyper": {"alpha": True}}}}, "layer m"),
        ({"layers": {"m": LAYER | {"embedding": 0}}}, "layer m"),
        ({"head_modules": ["b", "a"]}, "head_modules is ['b', 'a']"),
        ({"replaced": ["a", "a"]}, "replaced is ['a', 'a']"),
        ({"rows": {"w": [1, 1]}}, "rows w: [1, 1]"),
        ({"rows": {"w": [-1]}}, "rows w: [-1]"),
        ({"readout": {"pooling": "mean", "activations": []}}, "readout is {'pooling': 'mean'"),
        ({"readout": 3}, "readout is 3"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    """A key of another type or meaning is refused with its value."""
    store_checkpoint(tmp_path, checkpoint_of())
    edit_config(tmp_path, **changes)
    refused(tmp_path, CONFIG_FILE, found, "format version 2")


@pytest.mark.parametrize("key", [k for k in own_folder_checks.KEYS if not k.startswith("format")])
def test_every_key_is_required(tmp_path: Path, key: str) -> None:
    """A config without one of the keys is refused with its name."""
    store_checkpoint(tmp_path, checkpoint_of())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    del config[key]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    refused(tmp_path, CONFIG_FILE, f"no {key!r}", "format version 2")


def refused(folder: Path, where: str, found: str, expected: str = "") -> None:
    """Check that reading ``folder`` is refused with a whole message."""
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert_whole(caught.value, where=str(folder / where), found=found, expected=expected)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("layers.b.dense.down", None, "missing 'layers.b.dense.down'"),
        ("layers.b.dense.extra", np.ones(2, np.float32), "unknown 'layers.b.dense.extra'"),
        ("layers.b.dense.up", np.ones((5, 3), np.int32), "'layers.b.dense.up' has dtype I32"),
        ("heads.0.head.1.weight", None, "missing 'heads.0.head.1.weight'"),
        ("heads.0.head.0.bias", np.ones(5, np.float32), "'heads.0.head.0' has a weight [6, 4]"),
        ("heads.1.head.0.weight", np.ones(6, np.float32), "'heads.1.head.0' has a weight [6]"),
        ("heads.2.head.0.weight", np.ones((6, 4), np.float32), "unknown 'heads.2.head.0.weight'"),
        ("replaced.norm.bias", None, "missing 'replaced.norm.bias'"),
        ("rows.a.words.weight", np.ones((3, 4), np.float32), "'rows.a.words.weight' is not 2 rows"),
    ],
)
def test_tensors_and_config_must_agree(tmp_path: Path, key: str, value: Any, found: str) -> None:
    """A tensor that is extra, missing or misshapen is refused by name."""
    store_checkpoint(tmp_path, checkpoint_of())
    edit_tensors(tmp_path, **{key.replace(".", "__"): value})
    refused(tmp_path, WEIGHTS_FILE, found, "exactly the tensors")


@pytest.mark.parametrize(
    ("break_it", "where", "found"),
    [
        (lambda f: (f / "members/tone/adapter_config.json").unlink(), "", "no members/tone/"),
        (lambda f: (f / "members/tone/adapter_model.safetensors").unlink(), "members/tone", "no "),
        (
            lambda f: (
                (f / "members/tone").rename(f / "x")
                and (f / "members/tone.fine").rename(f / "members/tone")
            ),
            "members/tone",
            "tasks tone.fine",
        ),
    ],
)
def test_members_must_be_whole(
    tmp_path: Path, break_it: Callable[[Path], object], where: str, found: str
) -> None:
    """A member that is absent, half there or another task's is refused."""
    store_checkpoint(tmp_path / "a", with_members())
    break_it(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        read_folder(tmp_path / "a")
    assert str(tmp_path / "a" / where) in caught.value.problem
    assert found in caught.value.problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the toy checkpoint with full Lambda and a learnt scale."""
    return toys.write_checkpoint(tmp_path / "adapter", toys.checkpoint_parts(), BASE)


def test_what_a_trainer_writes_is_read_back(folder: Path) -> None:
    """Tasks, numbers, base, layers and heads come back in order and bit by bit."""
    parts = toys.checkpoint_parts()
    checkpoint = read_folder(folder)
    assert checkpoint.family == "mtl_lora"
    assert checkpoint.tasks == toys.TASKS
    assert checkpoint.base == BASE
    assert checkpoint.model_class == "BertForSequenceClassification"
    assert list(checkpoint.layers) == sorted(toys.MODULES)
    for module, layer in checkpoint.layers.items():
        assert layer.module == module
        assert dict(layer.hyper) == {"alpha": toys.ALPHA, "temperature": toys.TEMPERATURE}
        assert layer.tensors.keys() == parts["layers"][module].keys()
        for role, tensor in layer.tensors.items():
            expected = parts["layers"][module][role]
            assert tensor.shape == expected.shape
            assert tensor.numpy().tobytes() == expected.tobytes()
    for task, head in zip(toys.TASKS, checkpoint.heads[toys.HEAD], strict=True):
        weight, bias = parts["heads"][toys.HEAD][task.name]
        assert head is not None
        assert head.bias is not None
        assert head.weight.numpy().tobytes() == weight.tobytes()
        assert head.bias.numpy().tobytes() == bias.tobytes()


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 4),
    ups=st.integers(1, 3),
    tasks=st.integers(1, 4),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    diagonal=st.booleans(),
    scaler=st.booleans(),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
def test_the_same_checkpoint_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rank: int,
    ups: int,
    tasks: int,
    inputs: int,
    outputs: int,
    diagonal: bool,
    scaler: bool,
    dtype: str,
) -> None:
    """Writing twice, in any order of layers, gives the same files, and they read back equal."""
    modules = {
        name: toys.layer_values(
            seed + index, rank=rank, ups=ups, tasks=tasks, inputs=inputs, outputs=outputs,
            diagonal=diagonal, scaler=scaler, dtype=dtype,
        )
        for index, name in enumerate(["b.dense", "a.dense"])
    }  # fmt: skip
    heads = {
        "head": {
            f"t{i}": (np.full((i + 1, inputs), 0.5 + i).astype(NUMPY_DTYPES[dtype]), None)
            for i in range(tasks)
        }
    }
    root = tmp_path_factory.mktemp("twice")
    for name, order in (("first", list(modules)), ("second", list(modules)[::-1])):
        write_folder(
            root / name,
            tasks=tuple(
                Task(f"t{i}", i, tuple(map(str, range(i + 1))), "single_label_classification")
                for i in range(tasks)
            ),
            layers={module: dict(reversed(modules[module].items())) for module in order},
            heads=heads, alpha=3.0, temperature=0.05, model_class="X", base=BaseReference(),
        )  # fmt: skip
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (root / "first" / file).read_bytes() == (root / "second" / file).read_bytes()
    checkpoint = read_folder(root / "first")
    for module, values in modules.items():
        for role, tensor in checkpoint.layers[module].tensors.items():
            assert tensor.dtype == dtype
            assert tensor.shape == values[role].shape
            assert tensor.numpy().tobytes() == values[role].tobytes()


def test_arrays_in_any_memory_order_are_written_right(tmp_path: Path) -> None:
    """A transposed view is stored as it reads, not as it lies in memory."""
    parts = toys.checkpoint_parts()
    plain = toys.write_checkpoint(tmp_path / "plain", parts, BASE)
    for values in parts["layers"].values():
        values["up"] = np.asfortranarray(values["up"])
    viewed = toys.write_checkpoint(tmp_path / "viewed", parts, BASE)
    assert (plain / WEIGHTS_FILE).read_bytes() == (viewed / WEIGHTS_FILE).read_bytes()


def test_nothing_partial_is_left(folder: Path) -> None:
    """The folder holds the two files and no other."""
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_unusable_task_names_are_not_written(tmp_path: Path) -> None:
    """A checkpoint that could not be read is not written."""
    parts = toys.checkpoint_parts() | {"tasks": (Task("a/b", 0),)}
    with pytest.raises(CheckpointError) as caught:
        toys.write_checkpoint(tmp_path / "adapter", parts, BASE)
    assert_whole(caught.value, where=str(tmp_path / "adapter"), found="'a/b'")
    assert not (tmp_path / "adapter").exists()


def test_a_head_of_no_task_is_not_written(tmp_path: Path) -> None:
    """It would be left out without a word."""
    parts = toys.checkpoint_parts()
    parts["heads"][toys.HEAD]["weather"] = next(iter(parts["heads"][toys.HEAD].values()))
    with pytest.raises(CheckpointError) as caught:
        toys.write_checkpoint(tmp_path / "adapter", parts, BASE)
    assert_whole(caught.value, where=str(tmp_path / "adapter"), found="heads of weather")
    assert not (tmp_path / "adapter").exists()


def test_numbers_that_cannot_be_stored_are_not_written(tmp_path: Path) -> None:
    """Complex ones, which the format has no dtype for."""
    parts = toys.checkpoint_parts()
    layer = next(iter(parts["layers"].values()))
    layer["down"] = layer["down"].astype(np.complex128)
    with pytest.raises(CheckpointError) as caught:
        toys.write_checkpoint(tmp_path / "adapter", parts, BASE)
    assert_whole(caught.value, where="down", found="complex128", expected="F32")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("content", "own"),
    [
        (json.dumps({"format": "mtl-export"}), True),
        (json.dumps({"format": "peft"}), False),
        (json.dumps(["mtl-export"]), False),
        ("{", False),
        ("", False),
    ],
)
def test_a_folder_says_that_it_is_ours(tmp_path: Path, content: str, own: bool) -> None:
    """Only an object whose format is ours counts; a broken one belongs to nobody."""
    assert not is_own_folder(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(content)
    assert is_own_folder(tmp_path) is own


@pytest.mark.parametrize("names", [[], ["a/b", "b", "c"], ["a", "a", "c"]])
def test_unusable_task_names_are_refused(folder: Path, names: list[str]) -> None:
    """Task names must be safe folder names, each different."""
    entries = [{"name": t.name, "labels": list(t.labels), "kind": t.kind} for t in toys.TASKS]
    edit_config(folder, tasks=[e | {"name": n} for e, n in zip(entries, names, strict=False)])
    refused(folder, CONFIG_FILE, "task names", "each different")


def test_truncated_weights_are_refused(folder: Path) -> None:
    """Weights that lost their last byte are refused."""
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, WEIGHTS_FILE, "not a whole safetensors file")


def test_unknown_numbers_are_left_to_the_command(tmp_path: Path) -> None:
    """Numbers that are None are read as unknown, not as zero."""
    parts = toys.checkpoint_parts() | {"alpha": None, "temperature": None}
    folder = toys.write_checkpoint(tmp_path / "adapter", parts, BASE)
    assert all(not layer.hyper for layer in read_folder(folder).layers.values())


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    """The folder of before says one thing: its version, and how to get the one there is."""
    edit_config(folder, format_version=version)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert caught.value.problem == f"{folder / CONFIG_FILE}: format_version {version!r}"
    assert caught.value.expected == "format_version 2, the only one there is"
    assert "mtl_export.write_checkpoint" in caught.value.fix
