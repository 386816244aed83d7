from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_export_calibration.mixed import smallest_exclusion, worst_first

ORDER = [f"layer{index}" for index in range(12)]


def trial(costs: dict[str, float], seen: list[frozenset[str]]) -> Callable[[frozenset[str]], float]:
    """Return a trial in which every quantised layer costs its own points."""

    def run(excluded: frozenset[str]) -> float:
        seen.append(excluded)
        return sum(cost for name, cost in costs.items() if name not in excluded)

    return run


def test_nothing_is_excluded_where_nothing_is_lost() -> None:
    """One trial, no layer left out."""
    seen: list[frozenset[str]] = []
    found = smallest_exclusion(ORDER, trial({}, seen), max_drop=1.0, max_excluded=6)
    assert (found.excluded, found.passed, found.trials, len(seen)) == (frozenset(), True, 1, 1)


def test_layers_that_cost_nothing_are_put_back() -> None:
    """SQNR ranks layer0 first, but the data say that layer1 and layer4 are to blame."""
    seen: list[frozenset[str]] = []
    costs = {"layer1": 2.0, "layer4": 3.0}
    found = smallest_exclusion(ORDER, trial(costs, seen), max_drop=1.0, max_excluded=6)
    assert (found.excluded, found.passed) == (frozenset({"layer1", "layer4"}), True)
    assert found.drop == 0.0
    assert len(seen) == len(set(seen)) == found.trials


def test_too_many_layers_are_no_answer() -> None:
    """Where more than allowed would have to go, the best that was tried is said to fail."""
    costs = dict.fromkeys(ORDER, 1.0)
    found = smallest_exclusion(ORDER, trial(costs, []), max_drop=1.0, max_excluded=6)
    assert not found.passed
    assert (len(found.excluded), found.drop) == (6, 6.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), min_size=12, max_size=12))
def test_no_layer_of_the_result_can_be_left_out(costs: list[float]) -> None:
    """Putting any one back costs too much; what is kept passes."""
    run = trial(dict(zip(ORDER, costs, strict=True)), [])
    found = smallest_exclusion(ORDER, run, max_drop=2.0, max_excluded=12)
    assert found.passed
    assert run(found.excluded) <= 2.0
    assert all(run(found.excluded - {name}) > 2.0 for name in found.excluded)


def test_the_layer_that_costs_any_task_most_comes_first() -> None:
    """The worst task speaks for a layer."""
    order = worst_first(
        {"a": {"x": 30.0, "y": 20.0}, "b": {"x": 10.0, "y": 50.0}, "c": {"x": 40.0}}
    )
    assert order == ["b", "a", "c"]


@pytest.mark.parametrize("limit", [0, 1])
def test_the_limit_may_forbid_to_exclude(limit: int) -> None:
    """max_excluded is never passed."""
    found = smallest_exclusion(ORDER, trial({"layer5": 9.0}, []), max_drop=1.0, max_excluded=limit)
    assert not found.passed
    assert len(found.excluded) <= limit
