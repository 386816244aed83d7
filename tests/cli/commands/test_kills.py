"""``kill -9`` at any moment of any command that writes: what lies there is old, none or new."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtl_export.bundle.manifest import damage, read_manifest
from mtl_export.bundle.staging import is_staging
from mtl_export.bundle.verify import output_folders
from tests.cli.conftest import files_below
from tests.factories import TASKS, WORDS

ENTRY = "from mtl_export_cli.main import main; main()"
OTHER = TASKS[0].name
# Ten moments for each command; the first half without an old result, where there can be none.
SEEDS = range(10)


@dataclass(frozen=True)
class Command:
    """What is killed.

    Attributes:
        words: Its command line.
        old: The command line that writes an old result, to be replaced; none: there is none.
        is_same: Two runs write the same bytes: nothing of it is measured.
    """

    words: tuple[str, ...]
    old: tuple[str, ...] = ()
    is_same: bool = True


COMMANDS = {
    "merge": Command(("merge", "--all-tasks", "--force"), ("merge", "--all-tasks", "--dtype",
                                                           "fp16")),
    "merge shared": Command(("merge", "--all-tasks", "--layout", "shared", "--force"), ("merge",
                                                                                        "--all-tasks")),
    "onnx": Command(("onnx", "--all-tasks", "--force"), ("onnx", "--all-tasks", "--dtype", "fp16")),
    "tasks add": Command(("tasks", "add", "out/onnx", "again", "--checkpoint", "adapter", "--from",
                          OTHER),
                         ("onnx", "--all-tasks")),
    "tasks rename": Command(("tasks", "rename", "out/onnx", OTHER, "renamed"), ("onnx",
                                                                                "--all-tasks")),
    "tasks remove": Command(("tasks", "remove", "out/onnx", OTHER), ("onnx", "--all-tasks")),
    "calibrate": Command(("calibrate", "--data", "rows.jsonl", "--max-drop", "100", "--threads",
                          "1", "--method", "max"),
                         ("onnx", "--all-tasks"), is_same=False),
    "parity --golden": Command(("parity", "--golden", "--onnx", "out/onnx"), ("onnx",
                                                                              "--all-tasks")),
}  # fmt: skip
# Without an old result there is nothing to edit, to quantise or to compare.
ALONE = {"merge", "merge shared", "onnx"}


def started(
    project: Path, words: tuple[str, ...], largest_file: int = resource.RLIM_INFINITY
) -> subprocess.Popen[str]:
    """Return ``mtl-export`` with those words, leading a group of processes of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2),
    )


def done(project: Path, words: tuple[str, ...]) -> float:
    """Run the words to their end, which must be exit code 0; return the seconds."""
    begun_s = time.monotonic()
    process = started(project, words)
    said, complained = process.communicate()
    assert process.returncode == 0, said + complained
    return time.monotonic() - begun_s


def contents(project: Path) -> dict[str, bytes]:
    """Return every file below ``out``, but for what is a cache."""
    out = project / "out"
    return {
        name: (out / name).read_bytes()
        for name in files_below(out)
        if not name.startswith("calibration/")
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, originals: Path) -> Path:
    """Give a project with labelled rows and nothing exported."""
    folder = tmp_path_factory.mktemp("kills") / "project"
    shutil.copytree(originals, folder)
    words = [word for word in WORDS if word.isalpha()][:8]
    lines = [
        {"task": task.name, "text": f"{word} night", "label": 0} for task in TASKS for word in words
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module", params=COMMANDS)
def case(
    request: pytest.FixtureRequest, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path, float]:
    """Give a command, projects before and after it, and how long it took."""
    command = COMMANDS[request.param]
    before = tmp_path_factory.mktemp("before") / "project"
    shutil.copytree(project, before)
    done(before, command.old)
    after = tmp_path_factory.mktemp("after") / "project"
    shutil.copytree(before, after)
    return request.param, before, after, done(after, command.words)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_command_leaves_old_none_or_new(
    case: tuple[str, Path, Path, float], project: Path, tmp_path: Path, seed: int
) -> None:
    """Every output is whole; the same command again exits 0 and leaves nothing of the other."""
    name, before, after, seconds = case
    command = COMMANDS[name]
    is_alone = name in ALONE and seed % 2 == 0
    place = tmp_path / "project"
    shutil.copytree(project if is_alone else before, place)
    old, new = contents(place), contents(after)
    group = killed(
        place, command.words, random.Random(f"{name} {seed}").uniform(0.25, 1.0) * seconds
    )
    assert_gone(group)
    assert_whole(place, old, new, is_same=command.is_same)

    done(place, command.words)
    assert files_below(place) == files_below(after)
    if command.is_same:
        assert contents(place) == new


@pytest.mark.slow
def test_a_disk_that_fills_up_changes_nothing(
    case: tuple[str, Path, Path, float], tmp_path: Path
) -> None:
    """A write that the system refuses ends in exit code 2; what was there is there."""
    name, before, *_ = case
    place = tmp_path / "project"
    shutil.copytree(before, place)
    process = started(place, COMMANDS[name].words, largest_file=600)
    said, complained = process.communicate()
    assert process.returncode == 2, said + complained
    assert "Traceback" not in complained
    assert contents(place) == contents(before)


def killed(place: Path, words: tuple[str, ...], delay_s: float) -> int:
    """Kill a run after ``delay_s``; return its group."""
    process = started(place, words)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        pytest.skip("the command had ended before it was killed")
    return process.pid


def assert_gone(group: int) -> None:
    """Fail if a process that the run had started outlives it."""
    for _ in range(100):
        with suppress(ProcessLookupError):
            os.killpg(group, 0)
            time.sleep(0.1)
            continue
        return
    pytest.fail(f"processes of group {group} live on")


def assert_whole(
    place: Path, old: dict[str, bytes], new: dict[str, bytes], *, is_same: bool
) -> None:
    """Fail if an output is neither as before nor as after."""
    out = place / "out"
    folders = list(output_folders(out)) if out.is_dir() else []
    for folder in folders:
        manifest = read_manifest(folder)
        assert manifest is not None
        assert damage(folder, manifest) == []
    found = {
        file: content
        for file, content in contents(place).items()
        if not any(is_staging(part) for part in Path(file).parts)
    }
    if is_same:
        for folder in folders:
            inside = f"{folder.relative_to(out).as_posix()}/"
            own = {file: value for file, value in found.items() if file.startswith(inside)}
            states = [{f: v for f, v in one.items() if f.startswith(inside)} for one in (old, new)]
            assert own in states, f"{folder} is torn"
