from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.errors import UsageError
from mtl_export.merge.layout import Layout, merge_layout, parse_size
from tests.merge import bases

SHARD = 40_000


@pytest.fixture
def sharded(tmp_path: Path) -> BoundModel:
    """Return a toy whose attention is adapted, over a base in several files."""
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    return bases.bound_model(base, adapter)


def offsets(plan: Layout) -> list[int]:
    """Return each tensor's offset modulo its item size, over all files."""
    rests = []
    for file in (*plan.shared, *(file for files in plan.own.values() for file in files)):
        header = json.loads(file.header()[8:])
        for piece in file.pieces:
            rests.append(header[piece.name]["data_offsets"][0] % piece.itemsize)
    return rests


def test_the_bases_files_are_kept(sharded: BoundModel) -> None:
    """Names and contents of the shards are the base's."""
    plan = merge_layout(sharded, sharded.adapters.tasks)
    assert plan.shared == ()
    for files in plan.own.values():
        assert [file.name for file in files] == [f.name for f in sharded.base.weight_files]
        placed = {piece.name: n for n, file in enumerate(files) for piece in file.pieces}
        assert placed == dict(sharded.base.file_of)


def test_a_size_limit_cuts_anew(sharded: BoundModel) -> None:
    """No file is larger than the limit unless it holds a single tensor."""
    limit = 20_000
    plan = merge_layout(sharded, sharded.adapters.tasks, max_shard_bytes=limit)
    for files in plan.own.values():
        assert len(files) > len(sharded.base.weight_files)
        assert [file.name for file in files] == [
            f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        for file in files:
            size = sum(piece.size_bytes for piece in file.pieces)
            assert size <= limit or len(file.pieces) == 1


def test_one_large_limit_makes_one_file(sharded: BoundModel) -> None:
    """A single file has the single file's name and no index."""
    plan = merge_layout(sharded, sharded.adapters.tasks, max_shard_bytes=10**9)
    task = sharded.adapters.tasks[0]
    assert [file.name for file in plan.own[task.name]] == ["model.safetensors"]
    assert plan.index(task) is None


def test_shared_tensors_are_stored_once(sharded: BoundModel) -> None:
    """Own files hold the adapted weights and nothing else; the index finds everything."""
    plan = merge_layout(sharded, sharded.adapters.tasks, layout="shared")
    adapted = {f"{module}.weight" for module in sharded.adapters.layers}
    for task in sharded.adapters.tasks:
        own = {piece.name for file in plan.own[task.name] for piece in file.pieces}
        assert own == adapted
        index = plan.index(task, "../_shared/")
        assert index is not None
        weight_map = index["weight_map"]
        assert isinstance(weight_map, dict)
        assert set(weight_map) == set(sharded.base.tensors)
        assert {weight_map[name].startswith("../_shared/") for name in adapted} == {False}
    names = [f.name for f in (*plan.shared, *plan.own["task0"])]
    assert names == [
        f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)
    ]
    alone = merge_layout(sharded, sharded.adapters.tasks).size_bytes
    assert plan.size_bytes < 0.75 * alone


def test_tensors_begin_on_a_multiple_of_their_item(tmp_path: Path) -> None:
    """A base of mixed dtypes, written wider: larger items go first, or readers cannot map them."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    base = bases.write_base(tmp_path / "base", dtype="F16")
    file = base / "model.safetensors"
    tensors = load_file(file) | {"model.a_flag": np.ones(3, np.bool_),
                                 "model.count": np.ones(1, np.int64)}  # fmt: skip
    save_file(tensors, file)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    assert set(offsets(merge_layout(bound, bound.adapters.tasks))) == {0}
    assert set(offsets(merge_layout(bound, bound.adapters.tasks, dtype="fp32"))) == {0}


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("1 GiB", 2**30), ("1.5kb", 1500), ("42", 42)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    """Decimal and binary units, in any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "0", "nan"])
def test_other_words_are_no_sizes(text: str) -> None:
    """They are refused with an example."""
    with pytest.raises(UsageError, match="such as 500MB"):
        parse_size(text)
