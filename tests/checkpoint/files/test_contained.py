from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mtl_export.checkpoint.base_model import companion_files, open_base
from mtl_export.checkpoint.files.contained import contained
from mtl_export.checkpoint.files.safetensors import write_safetensors
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import IntegrityError
from tests.checkpoint import peft_toys
from tests.checkpoint.messages import assert_whole


def base(folder: Path, names: tuple[str, ...] = ("model.safetensors",)) -> Path:
    """Write a base of one tensor per file."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / name, {f"w{number}": np.full(2, number, np.float32)})
    (folder / "config.json").write_text("{}")
    if names != ("model.safetensors",):
        weight_map = {f"w{number}": name for number, name in enumerate(names)}
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    return folder


def in_hub_cache(folder: Path, root: Path) -> Path:
    """Move the files of ``folder`` to where the hub's cache has them; return the snapshot."""
    model = root / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    (model / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = model / "blobs" / f"{number:040x}"
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "", ".", "..", "a\0b",
        "..\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\x",
    ],
)  # fmt: skip
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    """Parent folders, absolute paths and drives, with either slash, are not followed."""
    with pytest.raises(IntegrityError) as caught:
        contained(tmp_path, name, where="index")
    assert_whole(caught.value, where="index", found="outside", expected="in that folder")


def test_names_inside_are_the_files(tmp_path: Path) -> None:
    """Files, links inside the folder, and a folder that is itself a link are all well."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("x")
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("real")
    for name in ("a", "b", "sub/c", "missing", "a..b"):
        assert contained(tmp_path / "link", name, where="index") == tmp_path / "link" / name


@pytest.mark.parametrize("outside", ["../out.safetensors", "absolute", "link", "folder link"])
def test_a_shard_outside_the_base_is_refused(tmp_path: Path, outside: str) -> None:
    """An index may not name a file elsewhere, nor may a link have the name it gives."""
    folder = base(tmp_path / "base", ("one.safetensors", "two.safetensors"))
    target = (folder / "two.safetensors").rename(tmp_path / "out.safetensors")
    name = {"absolute": str(target), "link": "two.safetensors", "folder link": "f/out.safetensors"}
    if outside == "link":
        (folder / "two.safetensors").symlink_to(target)
    if outside == "folder link":
        (folder / "f").symlink_to(tmp_path)
    weight_map = {"w0": "one.safetensors", "w1": name.get(outside, outside)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(IntegrityError) as caught:
        open_base(str(folder))
    assert_whole(caught.value, where=str(index), found="outside")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_x.json"])
def test_a_base_file_that_is_a_link_out_is_refused(tmp_path: Path, name: str) -> None:
    """Weights, config and companions are not taken from elsewhere through a link."""
    folder = base(tmp_path / "base")
    (folder / "tokenizer_x.json").write_text("{}")
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError) as caught:
        companion_files(open_base(str(folder)))
    assert_whole(caught.value, where="base", found="outside")


def test_the_hub_cache_has_links_that_are_normal(tmp_path: Path) -> None:
    """A snapshot's links to its blobs are read, companions and nested shards included."""
    folder = base(tmp_path / "base", ("one.safetensors", "sub/two.safetensors"))
    (folder / "tokenizer_x.json").write_text("{}")
    snapshot = in_hub_cache(folder, tmp_path)
    found = open_base(str(snapshot))
    assert sorted(found.tensors) == ["w0", "w1"]
    assert [path.name for path in companion_files(found)] == ["tokenizer_x.json"]
    (tmp_path / "cache").symlink_to(snapshot.parents[2])
    again = open_base(str(tmp_path / "cache" / "models--org--name" / "snapshots" / "0123abc"))
    assert again.sha256 == found.sha256
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "f").write_text("{}")
    (snapshot / "tokenizer_y.json").symlink_to(other / "f")
    with pytest.raises(IntegrityError):
        companion_files(found)


def test_an_adapter_from_the_hub_cache_is_read(tmp_path: Path) -> None:
    """An adapter's snapshot is read, alone and as a linked folder of several tasks."""
    folder = peft_toys.write(tmp_path / "adapter", peft_toys.lora(peft_toys.QUERY))
    plain = open_checkpoint(folder).sha256
    snapshot = in_hub_cache(folder, tmp_path)
    assert open_checkpoint(snapshot).sha256 == plain
    (tmp_path / "tasks").mkdir()
    for task in ("one", "two"):
        (tmp_path / "tasks" / task).symlink_to(snapshot)
    assert len(open_checkpoint(tmp_path / "tasks", task_names=["one", "two"]).tasks) == 2


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_file_that_is_a_link_out_is_refused(
    tmp_path: Path, name: str, nested: bool
) -> None:
    """A checkpoint's files are its own, in the folder and in the folders of its tasks."""
    root = tmp_path / "tasks"
    folder = peft_toys.write(root / "one" if nested else root, peft_toys.lora(peft_toys.QUERY))
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(IntegrityError) as caught:
        open_checkpoint(root)
    assert_whole(caught.value, where=name, found="outside")


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    """Both files are in the base's hash, whichever changes."""
    names = ("a/m.safetensors", "b/m.safetensors")
    hashes = {open_base(str(base(tmp_path / "x", names))).sha256}
    for number, name in enumerate(names):
        folder = base(tmp_path / f"changed_{number}", names)
        write_safetensors(folder / name, {f"w{number}": np.full(2, 7, np.float32)})
        hashes.add(open_base(str(folder)).sha256)
    assert len(hashes) == 3
