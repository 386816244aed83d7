"""Language models whose tasks are adapters, or were edited: the tokens of the single graph."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mtl_export.errors import TaskNotFoundError
from mtl_export.graph.external_data import externalised, write_data
from mtl_export.graph.task_edit import remove_task
from mtl_export.names import DATA_FILE
from mtl_export.runtime import TaskSession

PROMPTS = [[5, 9, 30], [7], [11, 12, 13, 14]]
NEW = 6


@pytest.fixture(scope="module")
def expected(language: Path) -> dict[str, list[list[int]]]:
    """Return what the single graph generates under each task."""
    session = TaskSession(language / "onnx", threads=1)
    return {
        task.name: session.generate(PROMPTS, [task.name] * 3, max_new_tokens=NEW)
        for task in session.tasks
    }


def test_adapters_generate_what_the_single_graph_does(
    language: Path, expected: dict[str, list[list[int]]]
) -> None:
    """Prefill and decode each under the task's own adapter, back and forth."""
    session = TaskSession(language / "onnx" / "adapter-input", threads=1)
    for task in (*expected, *expected):
        assert session.generate(PROMPTS, [task] * 3, max_new_tokens=NEW) == expected[task]


def test_prefill_and_decode_lose_a_task_together(
    language: Path, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """One data file for both, as before; the other tasks' tokens and logits stay."""
    source, target = language / "onnx", tmp_path / "edited"
    target.mkdir()
    stems = ("prefill", "decode")
    models = {stem: ir.load(source / f"{stem}.onnx") for stem in stems}
    remove_task(models, "summary")
    places, files = write_data(models, target)
    assert set(files) == {DATA_FILE}
    with externalised(models, places):
        for stem, model in models.items():
            ir.save(model, target / f"{stem}.onnx")
            onnx.checker.check_model(str(target / f"{stem}.onnx"), full_check=True)
    for path in source.glob("*.json"):
        shutil.copyfile(path, target / path.name)
    session, before = TaskSession(target, threads=1), TaskSession(source, threads=1)
    for task in ("reply", "title"):
        assert session.generate(PROMPTS, [task] * 3, max_new_tokens=NEW) == expected[task]
        found, old = (
            one.run({"input_ids": PROMPTS}, [task] * 3).outputs["logits"]
            for one in (session, before)
        )
        np.testing.assert_array_equal(found, old)
    with pytest.raises(TaskNotFoundError):
        session.generate(PROMPTS, ["summary"] * 3, max_new_tokens=NEW)
