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

from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.formats import own_folder_checks as folder_v2_checks
from mtl_export.checkpoint.formats import own_folder_v2 as folder_v2
from mtl_export.checkpoint.formats.own_folder import CONFIG_FILE, WEIGHTS_FILE, read_folder
from mtl_export.checkpoint.formats.own_folder_v2 import write_v2
from mtl_export.errors import CheckpointError
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
    root = tmp_path_factory.mktemp("v2")
    checkpoint = with_members(seed) if members else checkpoint_of(seed, dtype=dtype, rank=rank)
    write_v2(root / "first", checkpoint)
    again = read_folder(root / "first")
    assert_same(again, checkpoint)
    write_v2(root / "second", again)
    files = sorted(p.relative_to(root / "first") for p in (root / "first").rglob("*.*")
                   if p.is_file())  # fmt: skip
    assert len(files) == (5 if members else 2)
    for file in files:
        assert (root / "first" / file).read_bytes() == (root / "second" / file).read_bytes()
    assert read_folder(root / "second").sha256 == again.sha256


def test_the_docstring_documents_every_key(tmp_path: Path) -> None:
    """Exactly the documented keys, in the documented order of meaning."""
    write_v2(tmp_path, checkpoint_of())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config.keys() == folder_v2_checks.KEYS.keys()
    for key in config:
        assert f"\n    {key} " in (folder_v2.__doc__ or "")


def test_task_names_do_not_collide(tmp_path: Path) -> None:
    """Names with dots cannot be mistaken for another task's head."""
    checkpoint = checkpoint_of()
    write_v2(tmp_path, checkpoint)
    keys = {entry.tensor for entry in read_folder(tmp_path).ledger}
    assert {"heads.0.head.1.weight", "heads.1.head.1.weight"} <= keys


def test_the_hash_covers_every_file(tmp_path: Path) -> None:
    """A change in one member is another checkpoint."""
    write_v2(tmp_path / "a", with_members())
    before = read_folder(tmp_path / "a").sha256
    edit_tensors(tmp_path / "a" / "members" / "tone", replaced__norm__bias=np.ones(4, np.float32))
    assert read_folder(tmp_path / "a").sha256 != before


def test_a_member_alone_is_a_checkpoint(tmp_path: Path) -> None:
    """One task's folder can be read by itself."""
    write_v2(tmp_path, with_members())
    member = read_folder(tmp_path / "members" / "tone.fine")
    assert [task.name for task in member.tasks] == ["tone.fine"]


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    """Such a folder could not be read again."""
    layer = LayerTensors("b.dense", {"down": Source(0)(1, 2)}, {"alpha": float("nan")})
    with pytest.raises(CheckpointError, match="alpha = nan"):
        write_v2(tmp_path / "x", replace(checkpoint_of(), layers={"b.dense": layer}))
    assert not (tmp_path / "x").exists()


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
    write_v2(tmp_path, checkpoint_of())
    edit_config(tmp_path, **changes)
    refused(tmp_path, CONFIG_FILE, found, "format version 2")


@pytest.mark.parametrize("key", [k for k in folder_v2_checks.KEYS if not k.startswith("format")])
def test_every_key_is_required(tmp_path: Path, key: str) -> None:
    """A config without one of the keys is refused with its name."""
    write_v2(tmp_path, checkpoint_of())
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
    write_v2(tmp_path, checkpoint_of())
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
    write_v2(tmp_path / "a", with_members())
    break_it(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        read_folder(tmp_path / "a")
    assert str(tmp_path / "a" / where) in caught.value.problem
    assert found in caught.value.problem
