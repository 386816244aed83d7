from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtl_export.adapters.binding import BoundModel
from mtl_export.bundle import merged
from mtl_export.bundle.manifest import OptionValue, Recipe, damage, read_manifest, write_manifest
from mtl_export.bundle.merged import MergedTask, MergeRequest, merge_tasks
from mtl_export.bundle.verify import verify_folder
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.checkpoint.safetensors import open_safetensors
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.errors import IntegrityError, OutputError
from mtl_export.merge import chunks, stream
from mtl_export.merge.lanes import WriteLane
from mtl_export.merge.writer import MergeOptions
from mtl_export_cli.main import cli
from tests.merge import bases

SHARD = 40_000
TASKS = ("task0", "task1", "task2")


@pytest.fixture
def bound(tmp_path: Path) -> BoundModel:
    """Return a toy over a base in several files, its attention adapted."""
    base = bases.write_base(tmp_path / "base", shard_bytes=SHARD)
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    return bases.bound_model(base, adapter)


def request_for(
    bound: BoundModel,
    parent: Path,
    options: MergeOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
) -> MergeRequest:
    """Return the request for all tasks."""
    options = options or MergeOptions()

    def recipe(name: str) -> Recipe:
        own: dict[str, OptionValue] = {"task": name, "dtype": options.dtype}
        return Recipe("merge", own, {"base_sha256": bound.base.sha256}, "1")

    tasks = bound.adapters.tasks
    return MergeRequest(bound, tasks, parent, options, recipe, force, resume, verify)


def assert_whole(folder: Path) -> None:
    """Check that every file is what the folder's manifest says."""
    manifest = read_manifest(folder)
    assert manifest is not None
    assert damage(folder, manifest) == []
    listed = {*manifest.files, "mtl-export.json"}
    assert listed == {path.name for path in folder.iterdir()}


def statuses(results: list[MergedTask]) -> list[bool]:
    """Return which tasks were up to date."""
    return [result.plan.up_to_date for result in results]


def test_all_tasks_are_put_in_place(bound: BoundModel, tmp_path: Path) -> None:
    """One folder per task, whole, and nothing else beside them."""
    out = tmp_path / "out"
    results = merge_tasks(request_for(bound, out, verify=True))
    assert sorted(path.name for path in out.iterdir()) == list(TASKS)
    count = sum(piece.size_bytes // 2 for piece in _tensors(bound))
    for result in results:
        assert_whole(out / result.task.name)
        assert result.verified_count == count
        report = json.loads((out / result.task.name / "merge-report.json").read_text())
        assert report["task"] == result.task.name
        assert set(report["layers"]) == set(bound.adapters.layers)


def test_what_is_there_is_left_alone(bound: BoundModel, tmp_path: Path) -> None:
    """Only tasks that are missing or damaged are written again."""
    out = tmp_path / "out"
    merge_tasks(request_for(bound, out))
    assert statuses(merge_tasks(request_for(bound, out))) == [True, True, True]
    shutil.rmtree(out / "task1")
    (out / "task2" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config.json has 2 bytes"):
        merge_tasks(request_for(bound, out))
    assert statuses(merge_tasks(request_for(bound, out, force=True))) == [True, False, False]
    for name in TASKS:
        assert_whole(out / name)


def test_nothing_is_hashed_twice(
    bound: BoundModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest takes the weights' hashes from the writer; small files are hashed for it."""
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.suffix)
        return sha256_of_file(path)

    monkeypatch.setattr("mtl_export.bundle.manifest.sha256_of_file", counted)
    merge_tasks(request_for(bound, tmp_path / "out"))
    assert ".safetensors" not in hashed
    assert ".json" in hashed


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
    everything = sum(piece.size_bytes for piece in _tensors(bound))
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


REFERENCED = MergeOptions(layout="shared", is_linked=False)


def shared_folders(out: Path) -> list[str]:
    """Return the names of the folders of shared tensors."""
    return sorted(path.name for path in (out / "_shared").iterdir())


def verified(out: Path) -> dict[str, str]:
    """Return what ``verify`` says of the files of every folder."""
    checks = verify_folder(out)
    return {one.folder: one.verdict for one in checks if one.kind == "files"}


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
    if not lost.endswith("mtl-export.json"):
        assert verified(out)["task1"] == "failed"
    results = merge_tasks(request_for(bound, out, REFERENCED, force=True, verify=True))
    assert statuses(results) == [True, True, True]
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if lost.endswith("mtl-export.json"):
        return  # the tensors are whole, and each task's manifest has their hashes
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


def dtypes_of(folder: Path) -> set[str]:
    """Return the dtypes of all tensors that the folder's index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: open_safetensors(folder / name).tensors for name in index["weight_map"].values()}
    return {files[name][key].dtype for key, name in index["weight_map"].items()}


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


def test_what_is_up_to_date_is_verified_and_reported_too(bound: BoundModel, tmp_path: Path) -> None:
    """--verify reads the folders in place: a wrong value that has a right hash is found."""
    for name, options in {
        "alone": MergeOptions(), "linked": MergeOptions(layout="shared"), "referenced": REFERENCED,
    }.items():  # fmt: skip
        out = tmp_path / name
        written = merge_tasks(request_for(bound, out, options, verify=True))
        again = merge_tasks(request_for(bound, out, options, verify=True))
        assert statuses(again) == [True, True, True]
        assert [r.verified_count for r in again] == [r.verified_count for r in written]
        assert [r.report for r in again] == [r.report for r in written]
    path, *_ = sorted((tmp_path / "alone" / "task1").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    manifest = read_manifest(path.parent)
    assert manifest is not None
    write_manifest(path.parent, manifest.recipe)
    with pytest.raises(IntegrityError, match=r"task task1: not base \+ delta"):
        merge_tasks(request_for(bound, tmp_path / "alone", verify=True))


def test_a_wrong_base_is_refused_at_the_end(bound: BoundModel, tmp_path: Path) -> None:
    """The base's hash comes from the pass that reads it; until then nothing is in place."""
    checkpoint = dataclasses.replace(
        bound.checkpoint, base=dataclasses.replace(bound.checkpoint.base, sha256="0" * 64)
    )
    wrong = dataclasses.replace(bound, checkpoint=checkpoint)
    with pytest.raises(IntegrityError, match="its weights have SHA-256"):
        merge_tasks(request_for(wrong, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_leaves_what_resume_takes_up(
    bound: BoundModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C keeps the work; --resume writes only the rest; another request starts anew."""
    out = tmp_path / "out"
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(stream, "TICK_S", 0.0005)
    monkeypatch.setattr(merged, "JOURNAL_EVERY_S", 0.0)
    calls: list[int] = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_tasks(request_for(bound, out), interrupt)
    rests = [path.name for path in out.iterdir()]
    assert len(rests) == 1
    assert rests[0].startswith(".merge.mtl-export-")
    written: list[int] = []
    original = WriteLane.write

    def counted(self: WriteLane, offset: int, data: memoryview, address: int) -> None:
        written.append(len(data))
        original(self, offset, data, address)

    monkeypatch.setattr(WriteLane, "write", counted)
    merge_tasks(request_for(bound, out, resume=True))
    everything = 3 * sum(piece.size_bytes for piece in _tensors(bound))
    assert sum(written) < 0.6 * everything
    assert sorted(path.name for path in out.iterdir()) == list(TASKS)
    merge_tasks(request_for(bound, tmp_path / "whole"))
    for name in TASKS:
        assert_whole(out / name)
        for path in (out / name).iterdir():
            assert path.read_bytes() == (tmp_path / "whole" / name / path.name).read_bytes()


SLOW_MERGE = """
import sys, time
from mtl_export.bundle import merged
from mtl_export.merge import chunks, crew, lanes, stream
crew.FORK_BYTES = 0
chunks.CHUNK_BYTES, stream.TICK_S, merged.JOURNAL_EVERY_S = 2000, 0.002, 0.0
write = lanes.write_at
def slow_write(*arguments):
    time.sleep(0.001)
    write(*arguments)
lanes.write_at = slow_write
print("ready", flush=True)
from mtl_export_cli.main import cli
cli(sys.argv[1:])
"""


def test_a_run_killed_at_20_random_moments_leaves_the_old_result_or_the_new(
    bound: BoundModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder is whole after every kill, and --resume ends where an undisturbed run does."""
    arguments = [
        "merge", "--all-tasks", "--force", "-c", str(tmp_path / "adapter"),
        "-b", str(bound.base.folder), "-o", str(tmp_path / "out"),
    ]  # fmt: skip

    # What takes a killed run up runs here: a process of its own would mostly import.
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(merged, "JOURNAL_EVERY_S", 0.0)

    def start(*more: str) -> subprocess.Popen[str]:
        """Start the command and return when its imports are over."""
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_MERGE, *arguments, *more],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def end(process: subprocess.Popen[str]) -> int:
        """Wait for the process and return its exit code."""
        process.communicate()
        return process.returncode

    def hashes() -> dict[str, str]:
        return {
            f"{name}/{path.name}": sha256_of_file(path)
            for name in TASKS
            for path in (tmp_path / "out" / name).iterdir()
        }

    begun = time.monotonic()
    assert end(start()) == 0
    lasts = time.monotonic() - begun
    new = hashes()
    shutil.rmtree(tmp_path / "out")
    assert end(start("--dtype", "fp32")) == 0
    old = hashes()
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    generator = random.Random(20)
    cut = 0
    for _ in range(20):
        process = start()
        time.sleep(generator.uniform(0, lasts))
        process.send_signal(signal.SIGKILL)
        cut += end(process) == -signal.SIGKILL
        for name in TASKS:
            assert_whole(tmp_path / "out" / name)
        found = hashes()
        for name in TASKS:
            mine = {key: value for key, value in found.items() if key.startswith(f"{name}/")}
            assert mine in (
                {key: value for key, value in old.items() if key.startswith(f"{name}/")},
                {key: value for key, value in new.items() if key.startswith(f"{name}/")},
            )
        resumed = CliRunner().invoke(cli, [*arguments, "--resume"])
        assert resumed.exit_code == 0, resumed.output
        assert hashes() == new
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(TASKS)
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
    assert cut, "no run was cut short: this proved nothing"


def _tensors(bound: BoundModel) -> list[Tensor]:
    return list(bound.base.tensors.values())
