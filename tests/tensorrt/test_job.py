"""A job: largest first, several at a time, the same engines, none lost to another's failure."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from mtl_export.errors import EngineBuildError, OutputError
from mtl_export.tensorrt import (
    BuildOptions,
    EngineManifest,
    EngineOrder,
    EngineOutcome,
    EnginePart,
    Profile,
    build_engine,
    manifest_path,
    run_job,
)
from tests.tensorrt.engine_files import fingerprint
from tests.tensorrt.models import TASKS, write_merged

pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")

RTX = "tensorrt_rtx"
PROFILE = Profile({"input_ids": ((1, 1), (2, 8), (4, 16))})
OPTIONS = BuildOptions(profiles=(PROFILE,))


class Places:
    """Folders that are renamed when they are whole; remembers what is open and what was."""

    def __init__(self, finished: tuple[str, ...] = ()) -> None:
        self.open: list[str] = []
        self.swapped_beside: dict[str, list[str]] = {}
        self.aborted: list[str] = []
        self._finished = finished

    @contextmanager
    def __call__(self, order: EngineOrder) -> Iterator[Path | None]:
        """Open the folder of ``order``."""
        partial = order.target.with_name(f".{order.target.name}")
        partial.mkdir(parents=True, exist_ok=True)
        self.open.append(order.name)
        try:
            yield None if order.name in self._finished else partial
            self.swapped_beside[order.name] = [name for name in self.open if name != order.name]
            if order.target.is_dir():
                # what lies inside moves along
                shutil.copytree(order.target, partial, dirs_exist_ok=True)
                shutil.rmtree(order.target)
            partial.rename(order.target)
        except BaseException:
            self.aborted.append(order.name)
            shutil.rmtree(partial)
            raise
        finally:
            self.open.remove(order.name)


class Heard:
    """What a job reported."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.shares: list[float] = []
        self.calls: dict[str, Any] = {"begin": self.begin, "reached": self.reached}

    def begin(self, order: EngineOrder) -> None:
        """Note the order's name."""
        self.begun.append(order.name)

    def reached(self, share: float) -> None:
        """Note the share."""
        self.shares.append(share)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with one merged model a task, not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    for seed, task in enumerate(TASKS):
        write_merged(folder / task, seed=seed, task=task)
    return folder


def orders(models: Path, folder: Path) -> list[EngineOrder]:
    """Return one order a task, the last task the largest."""
    return [
        EngineOrder(
            name=task,
            target=folder / task,
            parts=(EnginePart(models / task / "model.onnx", "model.engine", OPTIONS),),
            size_bytes=size,
        )
        for size, task in enumerate(TASKS, start=1)
    ]


def engines(outcomes: list[EngineOutcome]) -> list[tuple[int, str, str, str]]:
    """Return what every engine is, its manifest checked."""
    found = []
    for outcome in outcomes:
        assert outcome.error is None
        path = outcome.order.target / "model.engine"
        assert EngineManifest.read(manifest_path(path)).engine_size_bytes == path.stat().st_size
        found.append(fingerprint(path))
    return found


def test_largest_first_and_the_same_engines_however_many_at_a_time(
    models: Path, tmp_path: Path
) -> None:
    """Outcomes come in the orders' order; engines are those of plain builds."""
    heard = Heard()
    alone = run_job(orders(models, tmp_path / "one"), Places(), library_name=RTX, **heard.calls)
    assert heard.begun == list(reversed(TASKS))
    assert [outcome.order.name for outcome in alone] == list(TASKS)
    assert all(outcome.is_built for outcome in alone)
    assert heard.shares[-1] == 1.0
    assert heard.shares == sorted(heard.shares)
    beside = run_job(orders(models, tmp_path / "two"), Places(), library_name=RTX, jobs=2)
    assert engines(alone) == engines(beside)
    plain = tmp_path / "plain.engine"
    build_engine(models / TASKS[0] / "model.onnx", plain, OPTIONS, library_name=RTX)
    assert engines(alone)[0] == fingerprint(plain)
    assert active_children() == []


def test_what_is_finished_is_not_work(models: Path, tmp_path: Path) -> None:
    """The share of what is left goes from nothing to all."""
    heard = Heard()
    places = Places(finished=(TASKS[0], TASKS[2]))
    outcomes = run_job(orders(models, tmp_path), places, library_name=RTX, **heard.calls)
    assert [outcome.is_built for outcome in outcomes] == [False, True, False]
    assert heard.shares[0] == 0.0
    assert heard.shares[-1] == 1.0


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_task_does_not_lose_the_others(models: Path, tmp_path: Path, jobs: int) -> None:
    """Its error is its outcome, whichever process it came from; nothing of it is left."""
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / TASKS[2] / "model.onnx.data").unlink()
    places = Places()
    outcomes = run_job(
        orders(tmp_path / "models", tmp_path / "engines"), places, library_name=RTX, jobs=jobs
    )
    first, second, third = outcomes
    assert engines([first, second])
    assert isinstance(third.error, EngineBuildError)
    assert "external data: model.onnx.data is missing" in third.error.problem
    assert places.aborted == [TASKS[2]]
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == sorted(TASKS[:2])


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_that_refuses_does_not_lose_the_others(
    models: Path, tmp_path: Path, jobs: int
) -> None:
    """What opens it says why."""
    places = Places()

    @contextmanager
    def refusing(order: EngineOrder) -> Iterator[Path | None]:
        if order.name == TASKS[1]:
            raise OutputError(f"{order.target}: it holds another result")
        with places(order) as place:
            yield place

    outcomes = run_job(orders(models, tmp_path), refusing, library_name=RTX, jobs=jobs)
    assert [type(outcome.error) for outcome in outcomes] == [type(None), OutputError, type(None)]


def test_an_outer_folder_is_put_in_place_while_nothing_is_written_inside(
    models: Path, tmp_path: Path
) -> None:
    """Its builder waits for the one that writes inside it, and nothing is lost in the swap."""
    places = Places()
    outer = EngineOrder(
        name="outer",
        target=tmp_path / "engines",
        parts=(EnginePart(models / TASKS[0] / "model.onnx", "model.engine", OPTIONS),),
        size_bytes=100,
    )

    @contextmanager
    def slow_inside(order: EngineOrder) -> Iterator[Path | None]:
        with places(order) as place:
            yield place
            if order is not outer:
                time.sleep(0.7)

    inner = orders(models, tmp_path / "engines")
    outcomes = run_job([outer, *inner], slow_inside, library_name=RTX, jobs=2)
    assert places.swapped_beside["outer"] == []
    assert len(engines(outcomes)) == 4


class Killing(Heard):
    """Kills every process that builds, the first time one reports."""

    def reached(self, share: float) -> None:
        """Kill what builds, once."""
        if not self.shares:
            for child in active_children():
                if child.pid is not None:
                    os.kill(child.pid, signal.SIGKILL)
        super().reached(share)


def test_a_process_that_dies_is_the_failure_of_its_task_alone(models: Path, tmp_path: Path) -> None:
    """The next task gets a new process."""
    killing = Killing()
    work = orders(models, tmp_path)
    outcomes = run_job(work, Places(), library_name=RTX, jobs=2, **killing.calls)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    # Both processes were killed; each was at one task, or not at any yet.
    assert 1 <= len(errors) <= 2
    assert all("was ended by SIGKILL" in str(error) for error in errors)
    assert engines([outcome for outcome in outcomes if not outcome.error])
    assert active_children() == []


class Interrupting(Heard):
    """Is interrupted from the keyboard at the first report."""

    def reached(self, share: float) -> None:
        """Be interrupted."""
        raise KeyboardInterrupt


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_ends_the_job(models: Path, tmp_path: Path, jobs: int) -> None:
    """No process stays, no half folder, and no other order is begun."""
    places, heard = Places(), Interrupting()
    with pytest.raises(KeyboardInterrupt):
        run_job(orders(models, tmp_path), places, library_name=RTX, jobs=jobs, **heard.calls)
    assert active_children() == []
    assert places.open == []
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(heard.begun) <= jobs
