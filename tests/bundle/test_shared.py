from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.bundle.manifest import OptionValue, Recipe, write_manifest
from mtl_export.bundle.merged import merge_tasks
from mtl_export.bundle.verify import verify_folder
from mtl_export.checkpoint.files.safetensors import open_safetensors
from mtl_export.errors import OutputError
from mtl_export.merge.writer import MergeOptions
from tests.bundle.merges import REFERENCED, TASKS, assert_whole, request_for, statuses, tensors_of


def shared_folders(out: Path) -> list[str]:
    """Return the names of the folders of shared tensors."""
    return sorted(path.name for path in (out / "_shared").iterdir())


def verified(out: Path) -> dict[str, str]:
    """Return what ``verify`` says of the files of every folder."""
    checks = verify_folder(out)
    return {one.folder: one.verdict for one in checks if one.kind == "files"}


def dtypes_of(folder: Path) -> set[str]:
    """Return the dtypes of all tensors that the folder's index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: open_safetensors(folder / name).tensors for name in index["weight_map"].values()}
    return {files[name][key].dtype for key, name in index["weight_map"].items()}


@pytest.mark.parametrize("is_linked", [True, False])
def test_shared_tensors_are_on_the_disk_once(
    is_linked: bool, bound: BoundModel, tmp_path: Path
) -> None:
    """As links or by reference, three tasks cost the base once and each task's own weights."""
    out = tmp_path / "out"
    options = MergeOptions(layout="shared", is_linked=is_linked)
    merge_tasks(request_for(bound, out, options, verify=True))
    inodes = {path.stat().st_ino: path.stat().st_size for path in out.rglob("*.safetensors")}
    touched = sum(bound.base_tensor(f"{m}.weight").size_bytes for m in bound.adapters.layers)
    everything = sum(piece.size_bytes for piece in tensors_of(bound))
    headers = 30_000
    assert sum(inodes.values()) < everything + 2 * touched + headers
    names = [*TASKS] if is_linked else ["_shared", *TASKS]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for folder in (path.parent for path in out.rglob("mtl-export.json")):
        assert_whole(folder)
    if is_linked:  # a folder is whole without its neighbours
        shutil.rmtree(out / "task0")
        assert_whole(out / "task1")


def test_shared_models_load(bound: BoundModel, tmp_path: Path) -> None:
    """Linked and referenced tensors are found, and they are the standalone ones."""
    import torch
    import transformers

    loaded = {}
    for name, options in {
        "standalone": MergeOptions(),
        "linked": MergeOptions(layout="shared"),
        "referenced": MergeOptions(layout="shared", is_linked=False),
    }.items():
        merge_tasks(request_for(bound, tmp_path / name, options))
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name / "task1", output_loading_info=True
        )
        model, info = found
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        loaded[name] = model.state_dict()
    for name in ("linked", "referenced"):
        for key, value in loaded["standalone"].items():
            assert torch.equal(loaded[name][key], value), (name, key)


@pytest.mark.parametrize(
    "lost", ["_shared", "_shared/*/mtl-export.json", "_shared/*/*.safetensors"]
)
def test_lost_shared_tensors_are_written_again(
    lost: str, bound: BoundModel, tmp_path: Path
) -> None:
    """Verify misses them, and the same command restores them with the tasks left alone."""
    out = tmp_path / "out"
    merge_tasks(request_for(bound, out, REFERENCED))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in out.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "failed" in verified(out).values()
    results = merge_tasks(request_for(bound, out, REFERENCED, force=True, verify=True))
    assert statuses(results) == [True, True, True]
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [result.is_restored for result in results] == [True, True, True]
    assert after == before
    assert set(verified(out).values()) == {"passed"}


def test_changed_shared_tensors_fail_and_force_mends_them(
    bound: BoundModel, tmp_path: Path
) -> None:
    """A flipped bit is found from each task's manifest; it is not overwritten unasked."""
    out = tmp_path / "out"
    merge_tasks(request_for(bound, out, REFERENCED))
    path, *_ = sorted(out.glob("_shared/*/*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verified(out)["task0"] == "failed"
    with pytest.raises(OutputError, match="has changed"):
        merge_tasks(request_for(bound, out, REFERENCED))
    merge_tasks(request_for(bound, out, REFERENCED, force=True))
    assert path.read_bytes() == content
    assert set(verified(out).values()) == {"passed"}


def test_other_shared_tensors_leave_those_of_other_tasks(bound: BoundModel, tmp_path: Path) -> None:
    """One task merged anew in another dtype gets a folder of its own; the last use ends one."""
    out = tmp_path / "out"
    merge_tasks(request_for(bound, out, REFERENCED))
    (first,) = shared_folders(out)
    half = MergeOptions("fp16", layout="shared", is_linked=False)
    one = dataclasses.replace(
        request_for(bound, out, half, force=True), tasks=bound.adapters.tasks[:1]
    )
    merge_tasks(one)
    assert len(shared_folders(out)) == 2
    assert set(verified(out).values()) == {"passed"}
    assert dtypes_of(out / "task0") == {"F16"}
    assert dtypes_of(out / "task1") == {"BF16"}
    merge_tasks(request_for(bound, out, half, force=True))
    assert first not in shared_folders(out)
    merge_tasks(request_for(bound, out, MergeOptions(), force=True))
    assert not (out / "_shared").exists()


def test_shared_tensors_in_use_or_of_others_are_not_removed(
    bound: BoundModel, tmp_path: Path
) -> None:
    """Those of an earlier version's task, and a folder that no merge wrote, stay."""
    out = tmp_path / "out"
    for name, options in {
        "_shared": {"task": "_shared"}, "old": {"task": "old", "shared_by": "reference"},
        "_shared/abc": {"task": "_shared"}, "_shared/mine": {"task": "mine"},
    }.items():  # fmt: skip
        (out / name).mkdir(parents=True)
        (out / name / "x").touch()
        own: dict[str, OptionValue] = {**options}
        write_manifest(out / name, Recipe("merge", own, {}, "1"))
    merge_tasks(request_for(bound, out))
    assert shared_folders(out) == ["mine", "mtl-export.json", "x"]
    shutil.rmtree(out / "old")
    merge_tasks(request_for(bound, out, MergeOptions("fp16"), force=True))
    assert shared_folders(out) == ["mine"]


def test_a_task_written_later_is_linked_to_the_others(bound: BoundModel, tmp_path: Path) -> None:
    """What tasks share is linked from one that is there, not stored again."""
    out = tmp_path / "out"
    options = MergeOptions(layout="shared")
    merge_tasks(request_for(bound, out, options))
    before = {path: path.stat().st_ino for path in out.rglob("*-00001-*.safetensors")}
    assert len({*before.values()}) == 1
    shutil.rmtree(out / "task1")
    assert statuses(merge_tasks(request_for(bound, out, options, verify=True)))[1] is False
    assert {path: path.stat().st_ino for path in before} == before
    assert_whole(out / "task1")
