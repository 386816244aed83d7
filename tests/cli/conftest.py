from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mtl_export.graph.parts
from mtl_export.adapters.binding import BoundModel
from mtl_export.api.settings import Settings
from mtl_export.api.sources import open_bound
from mtl_export.graph.names import OPSET
from mtl_export.graph.parts import trace_parts
from mtl_export.graph.trace import TracedModel
from mtl_export_cli.main import cli
from tests.factories import toy_base, toy_checkpoint

TOML = """\
base = "base"
checkpoint = "adapter"
"""


@dataclass(frozen=True)
class Outcome:
    """What one command line gave."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """Return stdout, which must be exactly one JSON object."""
        document: dict[str, Any] = json.loads(self.stdout)
        return document


Run = Callable[..., Outcome]
Trace = Callable[..., tuple[TracedModel, ...]]


@pytest.fixture
def run() -> Run:
    """Give a function that runs ``mtl-export`` with the given words in this process."""

    def call(*words: str, env: dict[str, str] | None = None) -> Outcome:
        result = CliRunner().invoke(cli, list(words), env=env)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a base, an adapter and a toml, to be copied and not changed."""
    folder = tmp_path_factory.mktemp("originals")
    toy_checkpoint(folder / "adapter", toy_base(folder / "base"))
    (folder / "mtl-export.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="session")
def known_traces(originals: Path) -> Trace:
    """Give ``trace_parts``, which traces copies of the originals but once: it takes seconds."""
    words = Settings(checkpoint=originals / "adapter", base=str(originals / "base"))
    original, found = open_bound(words), list[tuple[TracedModel, ...]]()

    def known(bound: BoundModel, opset: int = OPSET) -> tuple[TracedModel, ...]:
        if identity(bound) != identity(original) or opset != OPSET:
            return trace_parts(bound, opset)
        if not found:
            found.append(trace_parts(original))
        return found[0]

    return known


def identity(bound: BoundModel) -> tuple[object, ...]:
    """Return what a trace depends on: the base, and what tasks change in which class."""
    adapters = bound.adapters
    return (
        bound.base.sha256, bound.base.config, adapters.checkpoint_sha256, adapters.model_class,
        [*adapters.layers], [*adapters.heads], adapters.bare_outputs,
    )  # fmt: skip


@pytest.fixture
def traced_once(known_traces: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test's copy of the originals be traced no second time."""
    monkeypatch.setattr(mtl_export.graph.parts, "trace_parts", known_traces)


@pytest.fixture
def project(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> Path:
    """Give a copy of the originals, as the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def graphs(originals: Path, known_traces: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a project that has every ONNX graph, to be copied."""
    folder = tmp_path_factory.mktemp("graphs") / "project"
    shutil.copytree(originals, folder)
    config = ["--config", str(folder / "mtl-export.toml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mtl_export.graph.parts, "trace_parts", known_traces)
        for words in (["--all-tasks"], ["--all-tasks", "--layout", "per-task"]):
            result = CliRunner().invoke(cli, ["onnx", *words, *config])
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def exported(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> Path:
    """Give a copy of the project with every ONNX graph, as the current folder."""
    folder = tmp_path / "exported"
    shutil.copytree(graphs, folder)
    monkeypatch.chdir(folder)
    return folder


def files_below(folder: Path) -> list[str]:
    """Return every file below ``folder``, hidden ones too, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
