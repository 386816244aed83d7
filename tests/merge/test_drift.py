from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_export.merge import drift
from mtl_export.merge import fold_chunk as maker
from mtl_export.merge.drift import Squares, TaskDrift
from mtl_export.merge.writer import MergeOptions, layout_of, task_drift, write_tasks
from tests.merge import bases


def measured(folder: Path, dtype: str, scale_of_base: str = "F32") -> dict[str, TaskDrift]:
    """Return the drift of every task of a toy, by name."""
    base = bases.write_base(folder / "base", dtype=scale_of_base)
    bound = bases.bound_model(base, bases.write_checkpoint(folder / "adapter"))
    tasks = list(bound.adapters.tasks)
    folders = {task: folder / dtype / task.name for task in tasks}
    for place in folders.values():
        place.mkdir(parents=True)
    plan = layout_of(bound, tasks, MergeOptions(dtype=dtype))
    written = write_tasks(bound, folders, plan)
    return {task.name: task_drift(plan, task, written) for task in tasks}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_figures_are_those_of_the_definition(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all rows are measured, drift and loss are the quotients of whole matrices' norms."""
    monkeypatch.setattr(maker, "SAMPLE", 1)
    drifts = measured(tmp_path, dtype)
    bound = bases.bound_model(tmp_path / "base", tmp_path / "adapter")
    task = bound.adapters.tasks[2]
    for module, found in drifts[task.name].layers.items():
        base = bound.base_tensor(f"{module}.weight").numpy().astype(np.float64)
        change = bound.adapters.layers[module].delta(task.index)
        exact = base + change
        stored = exact.astype(np.float32).astype(np.float64)
        if dtype == "bf16":
            exponents = np.frexp(exact)[1] - 8
            stored = np.ldexp(np.rint(np.ldexp(exact, -exponents)), exponents)
        norm = np.linalg.norm
        assert found.rows == base.shape[0]
        assert found.drift == pytest.approx(norm(change) / norm(base), rel=1e-9)
        assert found.lost == pytest.approx(norm(stored - exact) / norm(change), rel=1e-6)
        assert found.output_error == pytest.approx(norm(stored - exact) / norm(exact), rel=1e-6)


def test_a_sample_is_near_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring one block in SAMPLE gives the same figures within a few percent."""
    monkeypatch.setattr(maker, "BLOCK", 300)
    sampled = measured(tmp_path / "sampled", "bf16")["task0"].total
    monkeypatch.setattr(maker, "SAMPLE", 1)
    whole = measured(tmp_path / "whole", "bf16")["task0"].total
    assert sampled.rows < whole.rows / 4
    assert sampled.drift == pytest.approx(whole.drift, rel=0.2)
    assert sampled.lost == pytest.approx(whole.lost, rel=0.2)


def test_bfloat16_loses_more_than_float32(tmp_path: Path) -> None:
    """The reason for the report: a small change drowns in bfloat16's rounding."""
    drifts = measured(tmp_path, "bf16")
    assert 1e-3 < drifts["task0"].total.lost < 1
    assert drifts["task0"].dtype == "BF16"
    assert measured(tmp_path / "again", "fp32")["task0"].total.lost < 1e-5


def test_more_than_a_tenth_is_much() -> None:
    """The limit is on the task's sum, not on one layer."""
    kept = Squares(rows=1, base=1.0, change=1.0, merged=1.0, rounding=0.0)
    lost = Squares(rows=1, base=1.0, change=1.0, merged=1.0, rounding=0.03)
    assert TaskDrift("a", "BF16", {"one": lost, "two": kept}).loses_much
    assert not TaskDrift("a", "BF16", {"one": lost, "two": kept, "three": kept, "four": kept}
                         ).loses_much  # fmt: skip
    assert drift.LOSS_LIMIT == 0.10


def test_nothing_measured_is_no_drift() -> None:
    """A task that changes nothing reports zeros, not NaN."""
    empty = TaskDrift("a", "", {})
    assert empty.as_dict() == {
        "task": "a", "dtype": "", "drift": 0.0, "lost": 0.0, "output_error": 0.0, "layers": {},
    }  # fmt: skip
