from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.base_model import INDEX_FILE, SINGLE_FILE, open_base
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.hashing import sha256_of_file, sha256_of_files
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array, Tensor
from mtl_export.errors import BaseModelError
from mtl_export.merge import chunks, layout
from mtl_export.merge import hashed_files as lanes
from mtl_export.merge import one_pass as stream
from mtl_export.merge import workers as crew
from mtl_export.merge.base_files import BaseFiles
from mtl_export.merge.fold_chunk import ChunkMerger
from mtl_export.merge.hashed_files import HashedOutput, HashedPrefix
from mtl_export.merge.writer import (
    MergeOptions,
    MergeState,
    layout_of,
    write_companions,
    write_merged,
    write_tasks,
)
from tests.merge import bases

SHARD = 40_000


def write_all(
    bound: BoundModel, folder: Path, options: MergeOptions | None = None
) -> dict[Task, Path]:
    """Write every task below ``folder`` and return where."""
    options = options or MergeOptions()
    folders = {task: folder / task.name for task in bound.adapters.tasks}
    for place in folders.values():
        place.mkdir(parents=True)
    plan = layout_of(bound, list(folders), options)
    shared = folder / "_shared" if plan.shared else None
    if shared:
        shared.mkdir()
    written = write_tasks(bound, folders, plan, shared=shared)
    for path, progress in written.files.items():
        assert progress == HashedPrefix(path.stat().st_size, sha256_of_file(path))
    for task, place in folders.items():
        write_companions(bound, task, place, plan, dtype=options.dtype, shared="../_shared/")
    return folders


def tensors_of(folder: Path) -> dict[str, Array]:
    """Return all tensors of a model folder, as from_pretrained would find them."""
    if (folder / SINGLE_FILE).is_file():
        return load_file(folder / SINGLE_FILE)
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}


def exact_weight(bound: BoundModel, name: str, task: Task) -> Array:
    """Return the float64 sum that the stored weight must be the rounding of."""
    base = bound.base_tensor(name).numpy().astype(np.float64)
    layer = bound.adapters.layers.get(name.removesuffix(".weight"))
    return base if layer is None else base + layer.delta(task.index)


def bits(values: Array) -> Array:
    """Return the bytes, so that -0 is not 0 and bfloat16 is compared exactly."""
    return np.ascontiguousarray(values).view(np.uint8)


def rounded_by_scaling(exact: Array, dtype: str) -> Array:
    """Return the nearest values of ``dtype``, ties to even.

    Scaling by a power of two is exact, and rint rounds half to even, so both are exact.
    """
    significand = {"BF16": 8, "F16": 11, "F32": 24}[dtype]
    smallest = {"BF16": -133, "F16": -24, "F32": -149}[dtype]
    exponents = np.maximum(np.frexp(exact)[1] - significand, smallest)
    result: Array = np.ldexp(np.rint(np.ldexp(exact, -exponents)), exponents)
    return result


@pytest.mark.parametrize("out", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shard_bytes", [None, SHARD])
def test_every_element_is_the_exact_sum_rounded_once(
    source: str, out: str, shard_bytes: int | None, tmp_path: Path
) -> None:
    """All tasks, odd shapes, every pair of dtypes, whole and sharded: bit for bit."""
    base = bases.write_base(tmp_path / "base", dtype=source, shard_bytes=shard_bytes)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    folders = write_all(bound, tmp_path / "out", MergeOptions(dtype=out))
    dtype = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[out]
    for task, folder in folders.items():
        found = tensors_of(folder)
        assert set(found) == set(bound.base.tensors)
        for name, values in found.items():
            expected = rounded_by_scaling(exact_weight(bound, name, task), dtype)
            np.testing.assert_array_equal(values.astype(np.float64), expected, err_msg=name)
            assert values.dtype == NUMPY_DTYPES[dtype]


def test_files_past_the_page_cache_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are written in pages; what they hold does not change, only the header's end."""
    base = bases.write_base(tmp_path / "base", dtype="F32", shard_bytes=SHARD)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    expected = write_all(bound, tmp_path / "cached")
    direct = []
    original = HashedOutput._write_directly

    def counted(self: HashedOutput, data: memoryview, offset: int) -> None:
        direct.append(len(data))
        assert offset % lanes.PAGE == 0
        assert len(data) % lanes.PAGE == 0
        original(self, data, offset)

    monkeypatch.setattr(HashedOutput, "_write_directly", counted)
    for module in (lanes, layout):
        monkeypatch.setattr(module, "DIRECT_BYTES", 1)
    found = write_all(bound, tmp_path / "direct")
    for task, folder in found.items():
        values = tensors_of(folder)
        for name, value in tensors_of(expected[task]).items():
            np.testing.assert_array_equal(bits(values[name]), bits(value))
    if lanes._open_direct(tmp_path / "direct" / "task0" / "model-00001-of-00009.safetensors"):
        assert sum(direct) > SHARD


@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("forked", [False, True])
def test_workers_do_not_show(
    cores: int, forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small chunks, made by any number of threads or processes, give the same bytes."""
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    expected = write_all(bound, tmp_path / "usual")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(stream, "core_count", lambda: cores)
    monkeypatch.setattr(crew, "FORK_BYTES", 0 if forked else 10**12)
    found = write_all(bound, tmp_path / "small")
    for task, folder in found.items():
        for path in folder.iterdir():
            assert path.read_bytes() == (expected[task] / path.name).read_bytes(), path.name


@pytest.mark.parametrize("shard_bytes", [None, SHARD])
def test_the_base_is_read_once_and_hashed_on_the_way(
    shard_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tasks: each tensor's bytes are read once, and the base's hash is known."""
    base = bases.write_base(tmp_path / "base", shard_bytes=shard_bytes)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    read: list[int] = []
    lock = threading.Lock()
    original = BaseFiles.read

    def counted(self: BaseFiles, tensor: Tensor, begin: int, end: int, out: Array) -> None:
        original(self, tensor, begin, end, out)
        with lock:
            read.append(out.nbytes)

    monkeypatch.setattr(BaseFiles, "read", counted)
    assert not bound.base.is_hashed
    write_all(bound, tmp_path / "out")
    assert sum(read) == sum(tensor.size_bytes for tensor in bound.base.tensors.values())
    assert bound.base.is_hashed
    assert bound.base.sha256 == sha256_of_files(bound.base.weight_files)


def test_a_base_in_pickles_is_converted(tmp_path: Path) -> None:
    """pytorch_model.bin gives what the same base in safetensors gives."""
    base = bases.write_base(tmp_path / "base")
    checkpoint = bases.write_checkpoint(tmp_path / "adapter")
    bound = bases.bound_model(base, checkpoint)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    state = {
        name: torch.from_numpy(tensor.numpy().view(np.int16)).view(torch.bfloat16)
        for name, tensor in bound.base.tensors.items()
    }
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:6],
             "pytorch_model-00002-of-00002.bin": names[6:]}  # fmt: skip
    for file, members in parts.items():
        torch.save({name: state[name] for name in members}, pickled / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = write_all(bases.bound_model(pickled, checkpoint), tmp_path / "found")
    expected = write_all(bound, tmp_path / "expected")
    for task, folder in found.items():
        assert (folder / "model-00001-of-00002.safetensors").is_file()
        values = tensors_of(folder)
        for name, value in tensors_of(expected[task]).items():
            np.testing.assert_array_equal(bits(values[name]), bits(value))


def test_a_tied_output_layer_stays_tied(tmp_path: Path) -> None:
    """What the base does not store is not stored, and the config still ties."""
    base = bases.write_base(tmp_path / "base", tied=True)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    for folder in write_all(bound, tmp_path / "out").values():
        assert "lm_head.weight" not in tensors_of(folder)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_output_layer_is_untied(tied: bool, tmp_path: Path) -> None:
    """It gets a tensor of its own, the embedding stays the base's, and the config says so."""
    base = bases.write_base(tmp_path / "base", tied=tied)
    adapter = bases.write_checkpoint(tmp_path / "adapter", more=("lm_head",))
    bound = bases.bound_model(base, adapter)
    for task, folder in write_all(bound, tmp_path / "out").items():
        found = tensors_of(folder)
        expected = rounded_by_scaling(exact_weight(bound, "lm_head.weight", task), "BF16")
        np.testing.assert_array_equal(found["lm_head.weight"].astype(np.float64), expected)
        embedding = bound.base.tensors["model.embed_tokens.weight"].numpy()
        np.testing.assert_array_equal(bits(found["model.embed_tokens.weight"]), bits(embedding))
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("forked", [False, True])
def test_a_weight_that_is_not_finite_names_layer_and_task(
    forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the base is found where it is folded, and a worker's error is the caller's."""
    monkeypatch.setattr(crew, "FORK_BYTES", 0 if forked else 10**12)
    base = bases.write_base(tmp_path / "base", dtype="F32")
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = bound.base.tensors[name]
    with (base / SINGLE_FILE).open("r+b") as file:
        file.seek(tensor.offset_bytes + 4 * 77)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(BaseModelError) as caught:
        write_all(bound, tmp_path / "out")
    assert caught.value.problem.startswith("model.layers.1.mlp.up_proj, task task0")
    assert "NaN or Inf in F32" in caught.value.problem


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("survivors", [0, 1])
def test_a_worker_that_is_killed_is_told(
    survivors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for a worker that the system has killed, nor if others live on."""
    monkeypatch.setattr(crew, "FORK_BYTES", 0)
    monkeypatch.setattr(stream, "core_count", lambda: 2)
    base = bases.write_base(tmp_path / "base")
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    make, lock = ChunkMerger.make, tmp_path / "killed"

    def killed(*arguments: Any) -> Any:
        with suppress(FileExistsError):
            if survivors:
                lock.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return make(*arguments)

    monkeypatch.setattr(ChunkMerger, "make", killed)
    with pytest.raises(RuntimeError, match="a worker process has died"):
        write_all(bound, tmp_path / "out")


def test_what_an_earlier_run_wrote_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is missing is written; a file that was changed meanwhile is begun anew."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    tasks = list(bound.adapters.tasks)
    plan = layout_of(bound, tasks, MergeOptions())
    whole = write_all(bound, tmp_path / "whole")
    folders = {task: tmp_path / "again" / task.name for task in tasks}
    stopped: list[MergeState] = []

    class StopError(Exception):
        """Ends the first run."""

    def stop(done: int, total: int, written: MergeState) -> None:
        if total // 3 < done:
            stopped.append(written)
            raise StopError

    for folder in folders.values():
        folder.mkdir(parents=True)
    monkeypatch.setattr(stream, "TICK_S", 0.0005)
    with pytest.raises(StopError):
        write_tasks(bound, folders, plan, tick=stop)
    before = stopped[0]
    assert 0 < sum(p.done_bytes for p in before.files.values()) < plan.size_bytes
    damaged = next(path for path, p in before.files.items() if p.done_bytes > 5000)
    with damaged.open("r+b") as opened:
        opened.seek(3000)
        opened.write(b"\x00\x01\x02\x03\x04\x05\x06")
    written: list[int] = []
    original = HashedOutput.write

    def counted(self: HashedOutput, offset: int, data: memoryview, address: int) -> None:
        written.append(len(data))
        original(self, offset, data, address)

    monkeypatch.setattr(HashedOutput, "write", counted)
    result = write_tasks(bound, folders, plan, resumed=before)
    kept = sum(p.done_bytes for path, p in before.files.items() if path != damaged)
    assert sum(written) <= plan.size_bytes - kept
    for task, folder in folders.items():
        for file in plan.own[task.name]:
            path = folder / file.name
            assert path.read_bytes() == (whole[task] / file.name).read_bytes()
            assert result.files[path].sha256 == sha256_of_file(path)


def test_one_task_of_many_is_the_same(tmp_path: Path) -> None:
    """write_merged is the one-task case."""
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    folders = write_all(bound, tmp_path / "all")
    task = bound.adapters.tasks[1]
    (tmp_path / "one").mkdir()
    write_merged(bound, task, tmp_path / "one")
    for path in folders[task].iterdir():
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_a_part_of_a_base_is_merged_too(tmp_path: Path) -> None:
    """A base of which tensors are left out cannot be hashed on the way, and is not."""
    base = bases.write_base(tmp_path / "base")
    bound = bases.bound_model(base, bases.write_checkpoint(tmp_path / "adapter"))
    part = {n: t for n, t in bound.base.tensors.items() if n != "model.norm.weight"}
    bound = dataclasses.replace(bound, base=dataclasses.replace(bound.base, tensors=part))
    folders = write_all(bound, tmp_path / "out")
    assert set(tensors_of(next(iter(folders.values())))) == set(part)
    assert bound.base.sha256 == open_base(str(base)).sha256
