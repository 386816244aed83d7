"""A graph that takes one task for the whole batch, run as one that takes a task for each row.

The batch is taken apart by task (``task_batches``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mtl_export.runtime.runners.base import AroundRunner, Runner
from mtl_export.runtime.runners.language import Generator
from mtl_export.runtime.runners.task_batches import by_task

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array


class OneTaskRunner(AroundRunner):
    """A runner whose batches may mix tasks, around one whose may not.

    Args:
        runner: Of a graph exported with ``--task-input scalar``.
    """

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, each row under its own task."""
        return by_task(inputs, self._runner.infer)


class OneTaskGenerator(OneTaskRunner):
    """The same around a runner that generates.

    Args:
        runner: Of such graphs.
        generator: The same.
    """

    def __init__(self, runner: Runner, generator: Generator) -> None:
        super().__init__(runner)
        self._generator = generator

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return exactly so many greedy tokens after each prompt, int64 ``[B, N]``."""

        def tokens(own: dict[str, Array]) -> dict[str, Array]:
            return {"tokens": self._generator.generate(own, max_new_tokens)}

        return by_task(inputs, tokens)["tokens"]


def one_task(runner: Runner) -> Runner:
    """Return ``runner``, of a graph with one task for the batch, as one that takes any batch."""
    if isinstance(runner, Generator):
        return OneTaskGenerator(runner, runner)
    return OneTaskRunner(runner)
