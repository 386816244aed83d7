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

import pytest
from click.testing import CliRunner

from mtl_export.adapters.binding import BoundModel
from mtl_export.bundle import merged
from mtl_export.bundle.manifest import read_manifest, write_manifest
from mtl_export.bundle.merged import merge_tasks
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.errors import IntegrityError, OutputError
from mtl_export.merge import chunks
from mtl_export.merge import one_pass as stream
from mtl_export.merge.hashed_files import HashedOutput
from mtl_export.merge.writer import MergeOptions
from mtl_export_cli.main import cli
from tests.bundle.merges import REFERENCED, TASKS, assert_whole, request_for, statuses, tensors_of


def test_all_tasks_are_put_in_place(bound: BoundModel, tmp_path: Path) -> None:
    """One folder per task, whole, and nothing else beside them."""
    out = tmp_path / "out"
    results = merge_tasks(request_for(bound, out, verify=True))
    assert sorted(path.name for path in out.iterdir()) == list(TASKS)
    count = sum(piece.size_bytes // 2 for piece in tensors_of(bound))
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
    original = HashedOutput.write

    def counted(self: HashedOutput, offset: int, data: memoryview, address: int) -> None:
        written.append(len(data))
        original(self, offset, data, address)

    monkeypatch.setattr(HashedOutput, "write", counted)
    merge_tasks(request_for(bound, out, resume=True))
    everything = 3 * sum(piece.size_bytes for piece in tensors_of(bound))
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
from mtl_export.merge import chunks
from mtl_export.merge import workers as crew
from mtl_export.merge import hashed_files as lanes
from mtl_export.merge import one_pass as stream
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


@pytest.mark.parametrize(
    "layout", [[], ["--layout", "shared", "--shared-by", "reference"]], ids=["alone", "shared"]
)
def test_a_run_killed_at_20_random_moments_leaves_the_old_result_or_the_new(
    bound: BoundModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: list[str]
) -> None:
    """Each folder is whole after every kill, and --resume ends where an undisturbed run does."""
    arguments = [
        "merge", "--all-tasks", "--force", "-c", str(tmp_path / "adapter"),
        "-b", str(bound.base.folder), "-o", str(tmp_path / "out"), *layout,
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
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left == {*TASKS, *(["_shared"] if layout else [])}
        assert not layout or len(list((tmp_path / "out" / "_shared").iterdir())) == 1
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
    assert cut, "no run was cut short: this proved nothing"
