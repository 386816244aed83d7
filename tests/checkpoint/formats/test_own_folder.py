from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.checkpoint.checkpoint import BaseReference, Task
from mtl_export.checkpoint.formats import own_folder as folder_module
from mtl_export.checkpoint.formats.own_folder import (
    CONFIG_FILE,
    CONFIG_KEYS,
    SUFFIXES,
    WEIGHTS_FILE,
    is_own_folder,
    read_folder,
    write_folder,
)
from mtl_export.checkpoint.hashing import sha256_of_files
from mtl_export.checkpoint.tensors import NUMPY_DTYPES
from mtl_export.errors import CheckpointError
from tests.adapters import toys
from tests.checkpoint.messages import assert_whole
from tests.factories import edit_config, edit_tensors

BASE = BaseReference("toy/bert", "ab" * 32)
MODULE = "bert.pooler.dense"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the toy checkpoint with full Lambda and a learnt scale."""
    return toys.write_checkpoint(tmp_path / "adapter", toys.checkpoint_parts(), BASE)


def test_what_is_written_is_read_back(folder: Path) -> None:
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


def test_the_config_says_what_the_docstring_documents(folder: Path) -> None:
    """Exactly the documented keys, in the documented order, with the values of the weights."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert list(config) == list(CONFIG_KEYS)
    documentation = folder_module.__doc__ or ""
    for key in config:
        assert f"\n    {key} " in documentation
    assert (config["r"], config["up_projections"]) == (toys.RANK, toys.UPS)
    assert (config["lambda_format"], config["learn_scale"]) == ("full", True)
    assert config["target_modules"] == sorted(toys.MODULES)
    assert config["tasks"][1] == {
        "name": "topics",
        "labels": ["ads", "jobs", "news", "sport"],
        "kind": "multi_label_classification",
    }


def test_the_hash_covers_both_files(folder: Path) -> None:
    """A change of one byte in either file is another checkpoint."""
    before = read_folder(folder).sha256
    assert before == sha256_of_files([folder / CONFIG_FILE, folder / WEIGHTS_FILE])
    edit_config(folder, base_model_name_or_path="toy/other")
    assert read_folder(folder).sha256 != before


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


def refused(folder: Path, file: str, found: str, expected: str = "") -> None:
    """Check that reading ``folder`` is refused with a whole message about ``file``."""
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert type(caught.value) is CheckpointError
    assert_whole(caught.value, where=str(folder / file), found=found, expected=expected)


@pytest.mark.parametrize("key", list(CONFIG_KEYS))
def test_every_key_is_required(folder: Path, key: str) -> None:
    """A config without one of the keys is refused with its name."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config[key]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    refused(folder, CONFIG_FILE, f"no {key!r}", "format version 1")


def task_entry(**changes: Any) -> list[dict[str, Any]]:
    """Return the toy tasks with the first one changed."""
    entries = [{"name": t.name, "labels": list(t.labels), "kind": t.kind} for t in toys.TASKS]
    return [entries[0] | changes, *entries[1:]]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"colour": 1}, "unknown 'colour'"),
        ({"r": "5"}, "r is '5'"),
        ({"r": 5.0}, "r is 5.0"),
        ({"r": True}, "r is True"),
        ({"up_projections": None}, "up_projections is None"),
        ({"lora_alpha": "7"}, "lora_alpha is '7'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"temperature": [0.1]}, "temperature is [0.1]"),
        ({"learn_scale": 1}, "learn_scale is 1"),
        ({"tasks": {}}, "tasks is {}"),
        ({"format_version": 3}, "format_version 3"),
        ({"lambda_format": "sparse"}, "lambda_format 'sparse'"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [MODULE, MODULE]}, "target_modules is"),
        ({"target_modules": ["b", "a"]}, "target_modules is ['b', 'a']"),
        ({"target_modules": [1]}, "target_modules.0 is 1"),
        ({"head_modules": ["a", None]}, "head_modules.1 is None"),
        ({"tasks": ["sentiment"]}, "task 'sentiment'"),
        ({"tasks": task_entry(colour=1)}, "task {"),
        ({"tasks": task_entry(name=1)}, "task {"),
        ({"tasks": task_entry(labels=[1, 2])}, "task {"),
        ({"tasks": task_entry(kind="ranking")}, "task {"),
        ({"tasks": task_entry(kind="headless")}, "task {"),
        ({"tasks": task_entry(labels=[])}, "task {"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_wrong_config_is_refused(folder: Path, changes: dict[str, Any], found: str) -> None:
    """A key of another type or meaning is refused with its value."""
    edit_config(folder, **changes)
    refused(folder, CONFIG_FILE, found, "format version 1")


@pytest.mark.parametrize("names", [[], ["a/b", "b", "c"], ["a", "a", "c"]])
def test_unusable_task_names_are_refused(folder: Path, names: list[str]) -> None:
    """Task names must be safe folder names, each different."""
    entries = task_entry()
    edit_config(folder, tasks=[e | {"name": n} for e, n in zip(entries, names, strict=False)])
    refused(folder, CONFIG_FILE, "task names", "each different")


def test_all_problems_of_a_config_are_listed(folder: Path) -> None:
    """A missing, an unknown and a wrong key are one message."""
    edit_config(folder, colour=1, r="5")
    for found in ("unknown 'colour'", "r is '5'"):
        refused(folder, CONFIG_FILE, found)


def test_missing_weights_are_refused(folder: Path) -> None:
    """A config alone is half a checkpoint."""
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert_whole(caught.value, where=str(folder), found=f"no {WEIGHTS_FILE}", expected=WEIGHTS_FILE)


def test_truncated_weights_are_refused(folder: Path) -> None:
    """Weights that lost their last byte are refused."""
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, WEIGHTS_FILE, "not a whole safetensors file")


@pytest.mark.parametrize("role", list(SUFFIXES))
def test_every_tensor_of_a_layer_is_required(folder: Path, role: str) -> None:
    """A layer without one of its tensors is refused with the tensor's name."""
    name = f"{MODULE}.{SUFFIXES[role]}"
    edit_tensors(folder, **{name.replace(".", "__"): None})
    refused(folder, WEIGHTS_FILE, f"missing {name!r}", "adapter_config.json")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("bert.pooler.dense.lora_C", np.ones(2, np.float32), "unknown"),
        ("bert.pooler.dense.lora_B", np.ones((2, 12, 5), np.int32), "has dtype I32"),
        ("heads.topics.classifier.weight", None, "missing"),
        ("heads.other.classifier.weight", np.ones((2, 12), np.float32), "unknown"),
        ("heads.topics.other.bias", np.ones(4, np.float32), "unknown"),
    ],
)
def test_tensors_and_config_must_agree(folder: Path, key: str, value: Any, found: str) -> None:
    """A tensor that is extra, missing or no float is refused by name."""
    edit_tensors(folder, **{key.replace(".", "__"): value})
    refused(folder, WEIGHTS_FILE, found)
    refused(folder, WEIGHTS_FILE, repr(key), "exactly those")


def test_a_learnt_scale_that_is_not_announced_is_refused(folder: Path) -> None:
    """learn_scale false with a scaler in the file would drop it silently."""
    edit_config(folder, learn_scale=False)
    refused(folder, WEIGHTS_FILE, "unknown 'bert.encoder.layer.0.attention.self.query.lora_scaler'")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f: edit_config(f, r=4), "'bert.encoder.layer.0.attention.self.query.lora_A' is"),
        (lambda f: edit_config(f, up_projections=3), "lora_B' is [2, 12, 5], not [3, 12, 5]"),
        (lambda f: edit_config(f, lambda_format="diagonal"), "lora_lambdas' is [3, 5, 5], not [3"),
        (
            lambda f: edit_tensors(f, bert__pooler__dense__lora_B=np.ones((2, 5, 12), np.float32)),
            f"'{MODULE}.lora_B' is [2, 5, 12], not [2, 5, 5]",
        ),
        (
            lambda f: edit_tensors(f, bert__pooler__dense__lora_B_w=np.ones((2, 3), np.float32)),
            f"'{MODULE}.lora_B_w' is [2, 3], not [3, 2]",
        ),
        (
            lambda f: edit_tensors(f, heads__topics__classifier__weight=np.ones((3, 12), "f4")),
            "is [3, 12], but the task has 4 labels",
        ),
        (
            lambda f: edit_tensors(f, heads__topics__classifier__weight=np.ones(4, "f4")),
            "is [4], but the task has 4 labels",
        ),
        (
            lambda f: edit_tensors(f, heads__topics__classifier__bias=np.ones(5, "f4")),
            "'heads.topics.classifier.bias' is [5], not [4]",
        ),
        (
            lambda f: edit_tensors(f, heads__topics__classifier__weight=np.ones((4, 11), "f4")),
            "the tasks' heads 'classifier' take (11,) and (12,)",
        ),
    ],
)
def test_shapes_and_config_must_agree(
    folder: Path, change: Callable[[Path], None], found: str
) -> None:
    """A tensor whose shape is not what the config says is refused with both shapes."""
    change(folder)
    refused(folder, WEIGHTS_FILE, found, "T=3")


def test_unknown_numbers_are_left_to_the_command(folder: Path) -> None:
    """Null alpha and temperature are read as unknown, not as zero."""
    edit_config(folder, lora_alpha=None, temperature=None)
    assert all(not layer.hyper for layer in read_folder(folder).layers.values())
