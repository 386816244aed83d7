"""The fifth example: its scenes, its committed checkpoint, and the scores its README states."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import mtl_export as mx

EXAMPLE = Path(__file__).parents[2] / "examples" / "05_dense_tasks"
SMALL = 4_000_000
SCENES = "af54b21780f1"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Return the example's scripts, which import one another plainly."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("scenes", "train", "draw")
    yield {name: import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def test_scenes_are_the_same_everywhere(scripts: dict[str, ModuleType]) -> None:
    """By their hash; held-out ones are others than those trained on."""
    drawn = scripts["scenes"].scenes(2, 1)
    digest = sha256(drawn["images"].tobytes() + drawn["semseg"].tobytes()).hexdigest()
    assert digest.startswith(SCENES)
    assert not np.array_equal(drawn["images"], scripts["scenes"].held_out()["images"][:2])
    lengths = np.linalg.norm(drawn["normals"], axis=-1)
    assert np.abs(lengths - 1).max() < 1e-5
    assert set(np.unique(drawn["semseg"])) <= {0, 1, 2, 3}


def test_training_begins_at_the_base_and_learns(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps give a file that exports; the second phase leaves frozen weights alone."""
    train = scripts["train"]
    monkeypatch.setattr(train, "STEPS", (2, 2))
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--scenes", "8", "--output", str(tmp_path / "a.pth")]
    )
    torch.manual_seed(0)
    train.main()
    found = mx.inspect(tmp_path / "a.pth")
    assert [one["name"] for one in found.report["tasks"]] == list(train.TASKS)
    assert found.missing == ()


def test_the_readme_states_what_parity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed checkpoint's scores on the held-out scenes, to the digits shown."""
    monkeypatch.chdir(EXAMPLE)
    assert (EXAMPLE / "ckpt_epoch_1.pth").stat().st_size < SMALL
    mx.merge("ckpt_epoch_1.pth", output=tmp_path / "merged")
    result = mx.parity(
        "ckpt_epoch_1.pth", output=tmp_path, dataset="scenes.py:held_out", quick=True
    )
    assert result.exit_code == 0
    scores = {cell.task: cell.reference for cell in result.report.accuracy}
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| `(\w+)` \|[^|]*\|[^|\d]*(\d+\.\d+)[^|]*\|$", re.MULTILINE)
    shown = {match[1]: float(match[2]) for match in row.finditer(text)}
    assert shown.keys() == scores.keys()
    for task, score in scores.items():
        assert score is not None
        value = abs(score) * (100 if task in {"depth", "normals"} else 1)
        assert value == pytest.approx(shown[task], abs=0.06 if task == "normals" else 0.006)
