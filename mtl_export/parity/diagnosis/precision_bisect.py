"""Which parts of a half-precision graph must compute in float32 for it to pass.

    parts p_1 ... p_n in the order they run    ->    the least set that brings the error down

The shortest beginning p_1 ... p_k that is enough, together with what is chosen already, ends in a
part that is needed: it is chosen, and the search goes on in p_1 ... p_(k-1) until what is chosen
is enough. That takes log2(n) graphs for each part chosen. The Casts are in a copy in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError, shortened
from mtl_export.names import LOGITS, TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case
from mtl_export.parity.diagnosis.activations import graph_session
from mtl_export.parity.diagnosis.layer_errors import Bisection
from mtl_export.parity.outputs import answers
from mtl_export.parity.report import Cell
from mtl_export.parity.tolerance import FLOOR_FACTOR
from mtl_export.runtime.runners.base import Runner

HALF_DTYPES = frozenset({"fp16", "bf16"})
# Graphs that are tried before what is left is taken as it is.
MOST_RUNS = 64


@dataclass(frozen=True)
class FailedArtefact:
    """An artefact that is looked into.

    Attributes:
        artefact: What failed.
        cells: Its cells, with what was allowed for each task.
        modules: The layers whose names are looked for.
        threads: Of ONNX Runtime; 0 lets it decide.
    """

    artefact: Artefact
    cells: Sequence[Cell]
    modules: Sequence[str]
    threads: int = 0


def bisect_precision(
    failed: FailedArtefact, case: Case, tasks: Sequence[Task], oracle: Runner
) -> Bisection:
    """Return the smallest set of parts found that must compute in float32.

    Args:
        failed: A graph in half precision.
        case: The batch to try it on.
        tasks: The tasks that are looked at.
        oracle: In float64, open.

    Raises:
        GraphError: The graph has no file, or does not open with the Casts.
        EngineRunError: It does not run.
    """
    judge = _Judge(failed, case, tasks, oracle)
    before = judge.share(())
    if before is not None and before <= 1:
        text = f"in {case.name} no error is beyond what is allowed: nothing to widen"
        return Bisection(case.name, before, None, (), judge.runs, text)
    wide = judge.share(judge.parts)
    if wide is None or wide > 1:
        size = "not finite" if wide is None else f"{wide:.3g} times what is allowed"
        text = f"with every layer in float32 the error is still {size}: it is in the weights"
        return Bisection(case.name, before, wide, (), judge.runs, text)
    chosen, is_least = smallest(judge.parts, judge.passes, lambda: judge.runs >= MOST_RUNS)
    least = "" if is_least else f"; stopped after {judge.runs} graphs, so fewer may do"
    text = f"in float32 these are enough: {shortened(chosen)}{least}"
    return Bisection(case.name, before, wide, tuple(chosen), judge.runs, text)


def smallest(
    parts: Sequence[str],
    passes: Callable[[Sequence[str]], bool],
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[list[str], bool]:
    """Return parts that together pass, none of them to spare, and whether that is sure.

    Args:
        parts: All of them pass.
        passes: Whether a set does; more parts never do worse.
        is_over: No more may be tried: all that is left is taken.
    """
    chosen: list[str] = []
    end = len(parts)
    while end and not passes(chosen):
        low, high = 0, end
        while high - low > 1:
            if is_over():
                return [*parts[:high], *chosen], False
            middle = (low + high) // 2
            if passes([*parts[:middle], *chosen]):
                high = middle
            else:
                low = middle
        chosen.insert(0, parts[high - 1])
        end = high - 1
    return chosen, True


class _Judge:
    """Runs a graph with some parts in float32, and compares."""

    def __init__(
        self, failed: FailedArtefact, case: Case, tasks: Sequence[Task], oracle: Runner
    ) -> None:
        from mtl_export.graph.opened import open_graph
        from mtl_export.graph.widen import parts_of

        artefact, cells, modules = failed.artefact, failed.cells, failed.modules
        if artefact.path is None:
            raise GraphError(f"{artefact.name}: no file", expected="an ONNX graph")
        self._path, self._threads, self._modules = artefact.path, failed.threads, modules
        self._case, self._one_task = case, artefact.task
        self.parts = list(parts_of(open_graph(artefact.path), modules))
        self.runs = 0
        self._known: dict[frozenset[str], float | None] = {}
        compared = [cell for cell in cells if cell.case.startswith(case.name)]
        self._output = next((cell.output for cell in compared if cell.output), LOGITS)
        self._tasks = [task for task in tasks if (case.task_ids == task.index).any()]
        self._limits = {
            task.name: _limit([cell for cell in cells if cell.task == task.name], case)
            for task in self._tasks
        }
        exact = oracle.infer(case.inputs)
        if self._output not in exact:
            raise GraphError(
                f"{artefact.path}: output {self._output}",
                expected=(
                    f"one of {', '.join(exact)}, because the error is that of an output of the "
                    "oracle"
                ),
            )
        self._exact = exact[self._output]

    def passes(self, parts: Sequence[str]) -> bool:
        """Return whether nothing is beyond what is allowed with these in float32."""
        share = self.share(parts)
        return share is not None and share <= 1

    def share(self, parts: Sequence[str]) -> float | None:
        """Return the largest error as a share of what is allowed; None where not finite."""
        key = frozenset(parts)
        if key not in self._known:
            self.runs += 1
            self._known[key] = self._share(self._infer(key))
        return self._known[key]

    def _infer(self, parts: frozenset[str]) -> Array:
        """Return the output for the case, rows of tasks that are not served as 0."""
        from mtl_export.graph.opened import open_graph
        from mtl_export.graph.widen import widen
        from mtl_export.runtime.ort import run_session

        model = open_graph(self._path)
        widen(model, self._modules, parts)
        session = graph_session(model, self._path, self._threads)
        takes_one = any(v.name == TASK_IDS and v.shape == [1] for v in session.get_inputs())

        def run(inputs: Mapping[str, Array]) -> Array:
            found = run_session(session, self._path, inputs, [self._output])
            return found[self._output].astype(np.float64)

        if self._one_task is None and not takes_one:
            return run(self._case.inputs)
        result = np.zeros(self._exact.shape)
        for task in self._tasks:
            rows = self._case.task_ids == task.index
            inputs = self._case.rows(rows)
            ids = inputs.pop(TASK_IDS)
            found = run({**inputs, TASK_IDS: ids[:1]} if takes_one else inputs)
            result[rows, ..., : found.shape[-1]] = found
        return result

    def _share(self, found: Array) -> float | None:
        largest = 0.0
        for task in self._tasks:
            rows = self._case.task_ids == task.index
            width = len(task.labels) if self._output == LOGITS and task.labels else None
            left, right = (
                answers(self._case, rows, side)[:, :width] for side in (self._exact, found)
            )
            if not np.isfinite(right).all():
                return None
            error = float(np.abs(right - left).max(initial=0.0))
            largest = max(largest, error / self._limits[task.name])
        return largest


def _limit(cells: Sequence[Cell], case: Case) -> float:
    """Return what is allowed for one task: in this batch, else in any, else by its floor."""
    here = [cell.limit for cell in cells if cell.limit and cell.case.startswith(case.name)]
    anywhere = [cell.limit for cell in cells if cell.limit]
    floors = [FLOOR_FACTOR * cell.noise_floor for cell in cells if cell.noise_floor]
    known = here or anywhere or floors
    if not known:
        raise GraphError(
            f"{case.name}: no error that was compared",
            expected="a failed comparison, because what is allowed comes from it",
        )
    return min(known)
