from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.runtime.runners.one_task import OneTaskRunner, one_task
from mtl_export.runtime.runners.task_batches import by_task
from tests.parity.fakes import FakeRunner

INPUTS = {"x": np.array([[1.0], [2.0], [3.0], [4.0]]), "task_ids": np.array([2, 0, 2, -1])}


def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Multiply by the one task."""
    assert inputs["task_ids"].shape == (1,)
    return {"y": inputs["x"] * inputs["task_ids"][0]}


def test_every_row_gets_its_own_task() -> None:
    """One call for each task in the batch, rows back in their order, bad ids passed on."""
    seen: list[int] = []

    def infer(own: Mapping[str, Array]) -> dict[str, Array]:
        seen.append(int(own["task_ids"][0]))
        return answer(own)

    found = by_task(INPUTS, infer)
    np.testing.assert_array_equal(found["y"], [[2], [0], [6], [-4]])
    assert seen == [-1, 0, 2]


def test_a_runner_opens_and_closes_with_it() -> None:
    """The wrapper is a runner: its name, its life, its answers."""
    inner = FakeRunner(answer, name="inner")
    runner = one_task(inner)
    assert type(runner) is OneTaskRunner
    assert runner.name == "inner"
    with runner as opened:
        assert inner.is_open
        np.testing.assert_array_equal(opened.infer(INPUTS)["y"], [[2], [0], [6], [-4]])
    assert not inner.is_open


class Speaker(FakeRunner):
    """A runner that also generates."""

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Say the task again and again."""
        return np.full((len(inputs["x"]), max_new_tokens), inputs["task_ids"][0])


def test_tokens_are_put_back_in_order_too() -> None:
    """What generates still does."""
    runner = one_task(Speaker(answer))
    tokens = runner.generate(INPUTS, 2)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(tokens, [[2, 2], [0, 0], [2, 2], [-1, -1]])
