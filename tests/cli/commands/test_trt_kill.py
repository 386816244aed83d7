"""``mtl-export trt`` is killed in the middle of its work and run again."""

from __future__ import annotations

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
from mtl_export.runtime.tensorrt.manifest import EngineManifest
from tests.cli.conftest import Run, files_below
from tests.runtime.engine_files import fingerprint, without_engine_hashes

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

ENTRY = "from mtl_export_cli.main import main; main()"
WORDS = ["trt", "--all-tasks", "--layout", "both"]
ENGINES = 4
# The first moment is always tried, the others with -m slow.
MOMENTS = [pytest.param(0), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@dataclass(frozen=True)
class Undisturbed:
    """A project whose engines were built without a kill.

    Attributes:
        project: Its folder.
        files: What every file below ``out/engines`` is, by name.
        seconds: How long a build took.
    """

    project: Path
    files: dict[str, Any]
    seconds: float


def started(project: Path, *words: str) -> subprocess.Popen[str]:
    """Return ``mtl-export`` with those words, running in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", ENTRY, *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(process: subprocess.Popen[str]) -> Iterator[float]:
    """Yield the time at which each engine begins."""
    assert process.stderr is not None
    for line in process.stderr:
        if "] engine: " in line:
            yield time.monotonic()


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
    with started(project, *WORDS) as process:
        times = [*begun(process), time.monotonic()]
    assert process.returncode == 0
    assert len(times) == ENGINES + 1
    folder = project / "out" / "engines"
    return Undisturbed(project, contents(folder), (times[-1] - times[0]) / ENGINES)


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
