"""``mtl-export trt`` undisturbed, two engines at a time, and killed in the middle of its work."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtl_export.bundle.manifest import damage, read_manifest
from mtl_export.bundle.staging import is_staging
from mtl_export.checkpoint.hashing import sha256_of_file
from mtl_export.tensorrt.manifest import EngineManifest
from tests.cli.conftest import Run, files_below
from tests.factories import TASKS
from tests.tensorrt.engine_files import fingerprint, without_engine_hashes

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

ENTRY = "from mtl_export_cli.main import main; main()"
WORDS = ["trt", "--all-tasks", "--layout", "both"]
NAMES = [task.name for task in TASKS]
ENGINES = 1 + len(NAMES)
# The first moment is always tried, the others with -m slow.
MOMENTS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@dataclass(frozen=True)
class Undisturbed:
    """A project whose engines were built without a kill.

    Attributes:
        project: Its folder.
        files: What every file below ``out/engines`` is, by name.
        seconds: How long a build took.
        begun: What was said as each engine began.
        document: What ``--json`` printed.
    """

    project: Path
    files: dict[str, Any]
    seconds: float
    begun: list[str]
    document: dict[str, Any]


def started(project: Path, *words: str) -> subprocess.Popen[str]:
    """Return ``mtl-export`` with those words, running in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(process: subprocess.Popen[str]) -> Iterator[tuple[float, str]]:
    """Yield the time at which each engine begins, and the line that says so."""
    assert process.stderr is not None
    for line in process.stderr:
        if "] engine: " in line:
            yield time.monotonic(), line.rstrip()


def contents(folder: Path) -> dict[str, Any]:
    """Return what every file below ``folder`` is, whatever numbers the builder gave inside."""
    return {
        name: fingerprint(folder / name)
        if name.endswith(".engine")
        else without_engine_hashes(folder / name)
        for name in files_below(folder)
    }


@pytest.fixture(scope="module")
def undisturbed(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Give a project with all graphs and all engines, to be copied."""
    project = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(graphs, project)
    with started(project, *WORDS, "--json") as process:
        events, end_s = [*begun(process)], time.monotonic()
        assert process.stdout is not None
        document = json.loads(process.stdout.read())
    assert process.returncode == 0
    assert len(events) == ENGINES
    files = contents(project / "out" / "engines")
    seconds = (end_s - events[0][0]) / ENGINES
    return Undisturbed(project, files, seconds, [line for _, line in events], document)


def test_both_layouts_are_one_job(undisturbed: Undisturbed) -> None:
    """The largest is built first, and no two engines are one."""
    outputs = undisturbed.document["outputs"]
    paths = [output["path"] for output in outputs]
    assert paths == ["out/engines", *(f"out/engines/{name}" for name in NAMES)]
    assert [len(output["engines"][0]["tasks"]) for output in outputs] == [len(NAMES), 1, 1, 1]
    assert undisturbed.document["failures"] == []
    assert undisturbed.begun[0] == "[1/4] engine: single graph"
    engines = {(undisturbed.project / path / "model.engine").read_bytes() for path in paths}
    assert len(engines) == ENGINES


def test_two_at_a_time_give_the_engines_of_one_at_a_time(
    undisturbed: Undisturbed, exported: Path, run: Run
) -> None:
    """Every file, whatever numbers the builder gave inside."""
    outcome = run(*WORDS, "--jobs", "2", "-o", "beside")
    assert outcome.code == 0, outcome.stderr
    assert contents(Path("beside")) == undisturbed.files


def whole_engines(folder: Path) -> int:
    """Return how many engines lie in ``folder``; each must be whole, with its manifests."""
    count = 0
    for path in folder.rglob("*.engine"):
        if any(is_staging(part) for part in path.relative_to(folder).parts):
            continue
        manifest = EngineManifest.read(path.with_name(f"{path.name}.json"))
        assert manifest.engine_sha256 == sha256_of_file(path)
        output = read_manifest(path.parent)
        assert output is not None
        assert damage(path.parent, output) == []
        count += 1
    return count


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_killed_job_is_taken_up(
    undisturbed: Undisturbed,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Engines are whole or absent after ``kill -9``; the next run gives the same."""
    project = tmp_path / "project"
    shutil.copytree(undisturbed.project, project)
    folder = project / "out" / "engines"
    shutil.rmtree(folder)
    moment, jobs = random.Random(seed), str(1 + seed % 2)
    number, delay_s = moment.randrange(ENGINES), moment.uniform(0, 1.2) * undisturbed.seconds
    with started(project, *WORDS, "--jobs", jobs) as process:
        times = begun(process)
        for _ in range(number + 1):
            next(times)
        time.sleep(delay_s)
        process.kill()
        # Builders that it had started hold this pipe until they end, which they do unasked.
        for _ in times:
            pass
    finished = whole_engines(folder) if folder.is_dir() else 0
    # Those that began before the one that was killed are kept.
    assert finished >= number + 1 - int(jobs)

    monkeypatch.chdir(project)
    outcome = run(*WORDS, "--json")
    assert outcome.code == 0, outcome.stdout
    statuses = [output["status"] for output in outcome.json["outputs"]]
    assert statuses.count("up to date") == finished
    assert contents(folder) == undisturbed.files
    assert files_below(project) == files_below(undisturbed.project)
