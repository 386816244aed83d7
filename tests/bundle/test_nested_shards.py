"""A base whose shards have one name in two folders, from merge to verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mtl_export.bundle.merged import merge_tasks
from mtl_export.bundle.verify import verify_folder
from mtl_export.merge.writer import MergeOptions
from tests.bundle.merges import request_for
from tests.merge import bases

SHARD = 40_000
INDEX = "model.safetensors.index.json"


def renamed_shards(base: Path) -> Path:
    """Give every shard one name, each in a folder of its own; return the base."""
    index = json.loads((base / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    places = {name: f"part{number}/m.safetensors" for number, name in enumerate(names)}
    for name, place in places.items():
        (base / place).parent.mkdir()
        (base / name).rename(base / place)
    index["weight_map"] = {key: places[name] for key, name in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    return base


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return what transformers loads, once it says that nothing is missing."""
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = found
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return dict(model.state_dict())


@pytest.mark.parametrize(
    "options",
    [MergeOptions(), MergeOptions(layout="shared"), MergeOptions(max_shard_bytes=20_000)],
    ids=["standalone", "shared", "cut"],
)
def test_shards_of_one_name_are_kept_apart(tmp_path: Path, options: MergeOptions) -> None:
    """The merged models hold every tensor of both files, and are verified as whole."""
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    flat = bases.write_base(tmp_path / "flat", shard_bytes=SHARD)
    nested = renamed_shards(bases.write_base(tmp_path / "nested", shard_bytes=SHARD))
    for base in (flat, nested):
        bound = bases.bound_model(base, adapter)
        merge_tasks(request_for(bound, tmp_path / f"out_{base.name}", options, verify=True))
    expected = weights(tmp_path / "out_flat" / "task1")
    found = weights(tmp_path / "out_nested" / "task1")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    checks = verify_folder(tmp_path / "out_nested" / "task1")
    assert {check.verdict for check in checks if check.kind == "files"} == {"passed"}


def test_the_hash_taken_on_the_way_is_that_of_the_files(tmp_path: Path) -> None:
    """A merge that hashes the base while it reads it finds the hash that reading it twice does."""
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    base = renamed_shards(bases.write_base(tmp_path / "base", shard_bytes=SHARD))
    bound = bases.bound_model(base, adapter)
    expected = bases.bound_model(base, adapter).base.sha256
    merge_tasks(request_for(bound, tmp_path / "out"))
    assert bound.base.sha256 == expected
