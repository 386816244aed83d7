from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from mtl_export.api.settings import Settings
from mtl_export.errors import UsageError
from mtl_export_cli import options
from mtl_export_cli.options import with_settings


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FILE = "mtl-export.toml"


def settings_of(
    *words: str, env: dict[str, str] | None = None, toml: str | None = None
) -> tuple[Settings, dict[str, Any]]:
    """Return what a command with every shared option receives for ``words``."""
    received: list[tuple[Settings, dict[str, Any]]] = []

    @click.command()
    @with_settings(
        options.SOURCE, options.SELECTION, [options.LAYOUT], options.OUTPUT, options.TALK
    )
    def onnx(settings: Settings, **own: object) -> None:
        received.append((settings, own))

    if toml is not None:
        Path("mtl-export.toml").write_text(toml)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        onnx.main(list(words), "onnx", standalone_mode=False)
    return received[0]


def test_defaults() -> None:
    """Nothing given means nothing assumed."""
    assert settings_of() == (Settings(config_file=FILE), {"layout": None})


def test_settings_are_frozen() -> None:
    """A command cannot change what was asked for."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().force = True  # type: ignore[misc]


def test_every_flag_arrives() -> None:
    """Long and short spellings end in the record."""
    settings, own = settings_of(
        *("-c", "adapter", "-b", "org/base", "-o", "place", "--task", "a", "--task", "b"),
        *("--tasks", "a, b,c", "--alpha", "16", "--temperature", "0.5", "--dtype", "bf16"),
        *("--force", "--json", "-qq", "--layout", "per-task"),
    )
    assert settings == Settings(
        checkpoint=Path("adapter"),
        base="org/base",
        output=Path("place"),
        task=("a", "b"),
        tasks=("a", "b", "c"),
        alpha=16.0,
        temperature=0.5,
        dtype="bf16",
        force=True,
        json=True,
        verbosity=-2,
        typed=frozenset({
            "checkpoint", "base", "output", "task", "tasks", "alpha", "temperature", "dtype",
            "force", "json", "quiet", "layout",
        }),
        config_file=FILE,
    )  # fmt: skip
    assert own == {"layout": "per-task"}


ENVIRONMENT = {
    "MTL_EXPORT_CHECKPOINT": "adapter", "MTL_EXPORT_BASE": "org/base",
    "MTL_EXPORT_OUTPUT": "place", "MTL_EXPORT_TASK": "a b", "MTL_EXPORT_TASKS": "a,b,c",
    "MTL_EXPORT_ALPHA": "16", "MTL_EXPORT_TEMPERATURE": "0.5", "MTL_EXPORT_DTYPE": "bf16",
    "MTL_EXPORT_FORCE": "1", "MTL_EXPORT_JSON": "true", "MTL_EXPORT_VERBOSE": "2",
}  # fmt: skip


def test_every_flag_can_come_from_the_environment() -> None:
    """MTL_EXPORT_<NAME> says what --name would."""
    settings, _ = settings_of(env=ENVIRONMENT)
    assert settings == Settings(
        checkpoint=Path("adapter"),
        base="org/base",
        output=Path("place"),
        task=("a", "b"),
        tasks=("a", "b", "c"),
        alpha=16.0,
        temperature=0.5,
        dtype="bf16",
        force=True,
        json=True,
        verbosity=2,
        config_file=FILE,
    )
    assert settings_of(env={"MTL_EXPORT_ALL_TASKS": "1"})[0].all_tasks


TOML = "alpha = 1.0\ntemperature = 1.0\ncheckpoint = 'file'\n"


def test_flag_over_environment_over_file_over_default() -> None:
    """Each level wins over the next, per option."""
    env = {"MTL_EXPORT_ALPHA": "2", "MTL_EXPORT_TEMPERATURE": "2"}
    settings, _ = settings_of("--alpha", "3", env=env, toml=TOML)
    assert settings.alpha == 3.0
    assert settings.temperature == 2.0
    assert settings.checkpoint == Path("file")
    assert settings.dtype is None


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_another_configuration_file_can_be_named(tmp_path: Path, how: str) -> None:
    """--config and MTL_EXPORT_CONFIG replace the file of the current folder."""
    other = tmp_path / "other" / "my.toml"
    other.parent.mkdir()
    other.write_text("checkpoint = 'there'\n[output]\ndir = 'results'\n")
    if how == "flag":
        settings, _ = settings_of("--config", str(other), toml=TOML)
    else:
        settings, _ = settings_of(env={"MTL_EXPORT_CONFIG": str(other)}, toml=TOML)
    assert settings.alpha is None
    assert settings.checkpoint == other.parent / "there"
    assert settings.output_dir == other.parent / "results"


def test_help_does_not_read_a_broken_configuration() -> None:
    """Asking for help must work in every folder."""
    Path("mtl-export.toml").write_text("= broken")
    with pytest.raises(UsageError):
        settings_of()

    @click.command()
    @with_settings(options.SOURCE, options.TALK)
    def command(settings: Settings) -> None:
        pytest.fail("help runs no command")

    assert command.main(["--help"], "x", standalone_mode=False) == 0


def test_output_wins_over_the_output_folder() -> None:
    """--output is the exact place, the output folder the parent of the usual one."""
    assert settings_of(toml="[output]\ndir = 'there'\n")[0].folder("onnx") == Path("there/onnx")
    assert settings_of("-o", "here")[0].folder("onnx") == Path("here")


def test_task_and_all_tasks_exclude_each_other() -> None:
    """Two answers to one question are refused."""
    with pytest.raises(UsageError, match="both were given"):
        settings_of("--task", "a", "--all-tasks")
    with pytest.raises(UsageError, match="both were given"):
        settings_of(env={"MTL_EXPORT_TASK": "a", "MTL_EXPORT_ALL_TASKS": "1"})


def test_a_typed_selection_outranks_one_from_the_environment() -> None:
    """Flag over environment holds for the pair, too."""
    settings, _ = settings_of("--all-tasks", env={"MTL_EXPORT_TASK": "a"})
    assert (settings.task, settings.all_tasks) == ((), True)
    settings, _ = settings_of("--task", "a", env={"MTL_EXPORT_ALL_TASKS": "1"})
    assert (settings.task, settings.all_tasks) == (("a",), False)


def test_a_layout_from_the_file_is_for_all_tasks() -> None:
    """A named task asks for its merged graph, whatever layout the file gives the whole."""
    toml = "[onnx]\nlayout = 'single-graph'\n"
    assert settings_of("--all-tasks", toml=toml)[1] == {"layout": "single-graph"}
    assert settings_of("--task", "a", toml=toml)[1] == {"layout": None}
    typed = settings_of("--task", "a", "--layout", "single-graph", toml=toml)
    assert typed[1] == {"layout": "single-graph"}
