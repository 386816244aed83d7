"""A single graph that ``mtl-export tasks`` changed, judged for the tasks of one checkpoint.

    of this checkpoint    judged as in an untouched graph, under the ids that they have now
    of another            not-run, by name: parity with that checkpoint judges it
    no longer there       not-run, by name

Also compared: each of its tasks' labels, kind and stored slices. Not checked: what sets tensors
of all tasks at once, because those of other checkpoints are not known here. A graph with no
task of the checkpoint is not this checkpoint's, and fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_export.adapters.normal_form import AdapterSet
from mtl_export.checkpoint.tensors import Array
from mtl_export.graph.origins import EditedGraph
from mtl_export.names import TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import LAYERS, ZEROED
from mtl_export.parity.checks.stored_tensors import TABLE, stored_cell, task_differences
from mtl_export.parity.checks.task_tensors import OTHERS
from mtl_export.parity.judged import Judged
from mtl_export.parity.report import WHOLE, Cell
from mtl_export.runtime.runners.base import AroundRunner, Runner
from mtl_export.runtime.runners.language import PROMPT_TASK_IDS, Generator

_NOT_CHECKED = "not asked of a graph whose tasks were edited"


@dataclass(frozen=True)
class View:
    """Tasks of a checkpoint in an edited graph.

    Attributes:
        edited: What the graph says of itself.
        ids: Their ids in the graph, by their ids in the checkpoint.
        names: By the names in the checkpoint, those that cells have instead: of a second copy.
    """

    edited: EditedGraph
    ids: Mapping[int, int]
    names: Mapping[str, str]

    def judged(self, judged: Judged) -> Judged:
        """Return the same for these tasks, under the checkpoint's ids and widths."""
        own, artefact, adapters = judged.of_tasks(self.ids), judged.artefact, judged.bound.adapters
        widths = {one.subject.output: one.logits.shape[-1] for one in own.exact}
        kind = _EditedGenerator if isinstance(artefact.runner, Generator) else _EditedRunner
        runner = kind(artefact.runner, self, len(adapters.tasks), widths)
        # What its file holds for other checkpoints' tasks is not known here.
        apart = replace(artefact, runner=runner, path=None, edited=None,
                        checkpoint_sha256=adapters.checkpoint_sha256)  # fmt: skip
        more = dict.fromkeys((OTHERS, LAYERS, ZEROED), _NOT_CHECKED)
        extra = replace(own.extra, left_out={**own.extra.left_out, **more}, zeroed={})
        return replace(own, artefact=apart, extra=extra, is_alone=True)

    def file_cells(self, artefact: Artefact, adapters: AdapterSet) -> list[Cell]:
        """Return the cells of what the file says of these tasks and holds for them."""
        if artefact.graph is None:
            return []
        cell, wrong = artefact.cell(), []
        for own, index in self.ids.items():
            task, known = adapters.tasks[own], self.edited.tasks[index]
            wrong += task_differences(known, task, ("labels", "kind"))
        count = len(self.edited.tasks)
        stored = stored_cell(cell, artefact.graph, adapters, self.ids, count)
        return [cell.judged(TABLE, *wrong), stored]

    def named(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells under the names that copies have."""
        return [replace(cell, task=self.names.get(cell.task, cell.task)) for cell in cells]


def views_of(edited: EditedGraph, adapters: AdapterSet) -> list[View]:
    """Return the tasks that a graph has of a checkpoint; a view for each copy of one."""
    known = {task.index: task.name for task in adapters.tasks}
    copies: dict[int, list[int]] = {}
    for index, origin in enumerate(edited.origins):
        if origin.checkpoint_sha256 == adapters.checkpoint_sha256 and origin.index in known:
            copies.setdefault(origin.index, []).append(index)
    views = []
    for number in range(max(map(len, copies.values()), default=0)):
        ids = {own: found[number] for own, found in copies.items() if number < len(found)}
        names = {known[own]: edited.tasks[index].name for own, index in ids.items()}
        views.append(View(edited, ids, names if number else {}))
    return views


def unjudged_cells(artefact: Artefact, edited: EditedGraph, adapters: AdapterSet) -> list[Cell]:
    """Return a not-run cell for each task of the graph or of the checkpoint that is not judged."""
    sha256 = adapters.checkpoint_sha256
    there = {one.index for one in edited.origins if one.checkpoint_sha256 == sha256}
    reasons = {
        task.name: "the graph does not have it"
        for task in adapters.tasks
        if task.index not in there
    }
    for task, origin in zip(edited.tasks, edited.origins, strict=True):
        if origin.checkpoint_sha256 != sha256:
            reasons[task.name] = (
                f"it is {origin.name} of another checkpoint ({origin.checkpoint_sha256[:12]}...):"
                " mtl-export parity --checkpoint with that one judges it"
            )
    return [
        artefact.cell(name).not_run(WHOLE, f"{reason}; {edited.text}")
        for name, reason in reasons.items()
    ]


class _EditedRunner(AroundRunner):
    """A runner of an edited graph that takes a checkpoint's ids.

    Args:
        runner: Of the graph.
        view: The tasks of the checkpoint in it.
        task_count: How many tasks the checkpoint has.
        widths: By output, how many columns the checkpoint's tasks have.
    """

    def __init__(
        self, runner: Runner, view: View, task_count: int, widths: Mapping[str, int]
    ) -> None:
        super().__init__(runner)
        self._widths, self._graph_count = widths, len(view.edited.tasks)
        # A task that the graph does not have is nobody's to compare: it is only a neighbour.
        anyone = next(iter(view.ids.values()))
        ids = [view.ids.get(index, anyone) for index in range(task_count)]
        self._ids = np.array(ids, np.int64)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name."""
        outputs = self._runner.infer(self._mapped(inputs))
        return {
            name: _as_wide(value, self._widths[name]) if name in self._widths else value
            for name, value in outputs.items()
        }

    def _mapped(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: self._graph_ids(value) if name in {TASK_IDS, PROMPT_TASK_IDS} else value
            for name, value in inputs.items()
        }

    def _graph_ids(self, ids: Array) -> Array:
        if ids.dtype != np.int64:
            return ids  # what is to be refused, or answered with NaN
        known = (ids >= 0) & (ids < len(self._ids))
        unknown = np.where(ids < 0, ids, np.maximum(ids, self._graph_count))
        mapped: Array = np.where(known, self._ids[np.where(known, ids, 0)], unknown)
        return mapped


class _EditedGenerator(_EditedRunner):
    """The same around a runner that generates."""

    def generate(self, inputs: Mapping[str, Array], max_new_tokens: int) -> Array:
        """Return exactly so many greedy tokens after each prompt, int64 ``[B, N]``."""
        if not isinstance(self._runner, Generator):
            raise TypeError(self.name)
        return self._runner.generate(self._mapped(inputs), max_new_tokens)


def _as_wide(values: Array, width: int) -> Array:
    """Return ``values`` with so many columns, as far as those that differ are of no label."""
    if not values.ndim:
        return values
    room = width - values.shape[-1]
    if room > 0:
        # A row of NaN, the answer to an unknown id, is NaN in every column.
        fill = np.where(np.isnan(values[..., -1:]), np.nan, -np.inf).astype(values.dtype)
        return np.concatenate([values, *[fill] * room], axis=-1)
    rest = values[..., width:]
    return values[..., :width] if (np.isnan(rest) | np.isneginf(rest)).all() else values
