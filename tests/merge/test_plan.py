from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Tensor
from mtl_export.merge.plan import MERGED, SHARED, Plan, Speeds, make_plan, measure_speeds
from mtl_export.merge.writer import MergeOptions, layout_of, write_tasks
from mtl_export.names import SINGLE_ENGINE, SINGLE_GRAPH
from tests.merge import bases

SPEEDS = Speeds(1e9, 5e8, 1e8, 1e9, 2, 10**12)


@pytest.fixture
def bound(tmp_path: Path) -> BoundModel:
    """Return a toy whose attention is adapted."""
    base = bases.write_base(tmp_path / "base")
    adapter = bases.write_checkpoint(tmp_path / "adapter", projections=bases.ATTENTION)
    return bases.bound_model(base, adapter)


def disk(plan: Plan) -> dict[str, int]:
    """Return what each strategy leaves on the disk."""
    return {strategy.name: strategy.disk_bytes for strategy in plan.strategies}


@pytest.mark.parametrize("layout", ["standalone", "shared"])
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_the_bytes_of_merged_models_are_told_exactly(
    layout: str, dtype: str | None, bound: BoundModel, tmp_path: Path
) -> None:
    """What the plan says is what a merge writes."""
    tasks = bound.adapters.tasks
    options = MergeOptions(dtype=dtype, layout="shared" if layout == "shared" else "standalone")
    folders = {task: tmp_path / "out" / task.name for task in tasks}
    for folder in (*folders.values(), tmp_path / "out" / "_shared"):
        folder.mkdir(parents=True)
    shared = tmp_path / "out" / "_shared"
    written = write_tasks(bound, folders, layout_of(bound, tasks, options), shared=shared)
    size = sum(path.stat().st_size for path in written.files)
    told = disk(make_plan(bound, tasks, dtype, SPEEDS))
    assert told[SHARED if layout == "shared" else MERGED] == size


def test_no_weight_is_read(bound: BoundModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes decide everything."""

    def refuse(self: Tensor) -> None:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(Tensor, "numpy", refuse)
    monkeypatch.setattr(Tensor, "widened", refuse)
    assert make_plan(bound, bound.adapters.tasks, None, SPEEDS).tasks == 3


def test_one_task_is_merged_and_several_share_a_graph(bound: BoundModel) -> None:
    """Routing pays from the second task on; switching then loads nothing."""
    alone = make_plan(bound, bound.adapters.tasks[:1], None, SPEEDS)
    assert alone.recommended == MERGED
    together = make_plan(bound, bound.adapters.tasks, None, SPEEDS)
    assert together.recommended == SINGLE_GRAPH
    switch = {strategy.name: strategy.switch_bytes for strategy in together.strategies}
    assert switch[SINGLE_GRAPH] == switch[SINGLE_ENGINE] == 0
    assert 0 < switch[SHARED] < switch[MERGED]
    assert switch[SHARED] == together.touched_bytes


def test_a_full_disk_is_seen(bound: BoundModel) -> None:
    """What does not fit is marked and not recommended."""
    sizes = disk(make_plan(bound, bound.adapters.tasks, None, SPEEDS))
    free = (sizes[SINGLE_GRAPH] + sizes[SHARED]) // 2
    assert sizes[SHARED] < free < sizes[SINGLE_GRAPH]
    tight = make_plan(bound, bound.adapters.tasks, None, Speeds(1e9, 5e8, 1e8, 1e9, 2, free))
    fits = {strategy.name: strategy.fits for strategy in tight.strategies}
    assert fits[SHARED]
    assert not fits[SINGLE_GRAPH]
    assert tight.recommended == SHARED


def test_slower_disks_take_longer(bound: BoundModel) -> None:
    """Times rest on the measured speeds."""
    fast = make_plan(bound, bound.adapters.tasks, None, SPEEDS).strategies[0].seconds
    slow = make_plan(bound, bound.adapters.tasks, None, Speeds(1e9, 1e4, 1e8, 1e9, 2, 10**12))
    assert fast is not None
    seconds = slow.strategies[0].seconds
    assert seconds is not None
    assert seconds > fast + slow.strategies[0].write_bytes / 1e4 * 0.9


def test_speeds_are_measured_and_nothing_is_left(bound: BoundModel, tmp_path: Path) -> None:
    """The output folder need not exist, and is not made."""
    speeds = measure_speeds(bound, tmp_path / "not" / "yet")
    assert min(speeds.read_bytes_per_s, speeds.write_bytes_per_s) > 0
    assert min(speeds.fold_per_s, speeds.hash_bytes_per_s) > 0
    assert speeds.free_bytes > 0
    assert not (tmp_path / "not").exists()


def test_a_dtype_halves_every_strategy_and_is_named(bound: BoundModel) -> None:
    """Graphs too; each command, as printed, writes what is costed."""
    wide = make_plan(bound, bound.adapters.tasks, "fp32", SPEEDS)
    half = make_plan(bound, bound.adapters.tasks, "fp16", SPEEDS)
    unsaid = make_plan(bound, bound.adapters.tasks, None, SPEEDS)
    for name in (SINGLE_GRAPH, SINGLE_ENGINE):
        assert disk(half)[name] * 2 == disk(wide)[name] == disk(unsaid)[name]
    assert all(one.command.endswith(" --dtype fp16") for one in half.strategies)
    assert not any("--dtype" in one.command for one in unsaid.strategies)


def test_a_single_graph_holds_every_task_also_where_one_is_asked_for(bound: BoundModel) -> None:
    """Its cost is that of its command, which has no graph of some tasks."""
    some, everything = (
        make_plan(bound, tasks, None, SPEEDS)
        for tasks in (bound.adapters.tasks[:2], bound.adapters.tasks)
    )
    for name in (SINGLE_GRAPH, SINGLE_ENGINE):
        assert disk(some)[name] == disk(everything)[name]
    assert some.tasks == 2
    assert "serves all 3 tasks" in some.reason
