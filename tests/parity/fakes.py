"""Runners that answer by a function, for parity between artefacts that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from typing_extensions import Self

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import EngineRunError, MtlExportError
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case
from mtl_export.parity.judged import Judged
from mtl_export.parity.reference import Reference
from mtl_export.parity.report import Cell, ParityReport
from mtl_export.parity.run import run_parity
from mtl_export.parity.tolerance import Tolerance
from mtl_export.runtime.runners.base import Runner
from tests.graph import marked

TASKS = marked.TASKS
WIDTHS = [len(task.labels) for task in TASKS]
WIDEST = max(WIDTHS)
Answer = Callable[[Mapping[str, Array]], dict[str, Array]]
ERROR = {"fp64": 0.0, "fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}


def exact(inputs: Mapping[str, Array]) -> Array:
    """Return logits that depend on the row's tokens and task only; NaN for an unknown id."""
    content = (inputs["input_ids"] * inputs["attention_mask"]).sum(axis=1).astype(float)
    logits = np.full((len(content), WIDEST), np.nan)
    for row, task in enumerate(inputs["task_ids"]):
        if 0 <= task < len(TASKS):
            columns = np.arange(WIDEST)
            values = 3 * np.sin(content[row] * (columns + 1) + 2.0 * task)
            logits[row] = np.where(columns < WIDTHS[task], values, -np.inf)
    return logits


class FakeRunner:
    """A runner that answers by a function, and records what it was asked."""

    def __init__(
        self, answer: Answer, *, name: str = "fake", refuses: MtlExportError | None = None
    ) -> None:
        self.name = name
        self._answer = answer
        self._refuses = refuses
        self.asked: list[Mapping[str, Array]] = []
        self.is_open = False

    def __enter__(self) -> Self:
        """Open, or refuse."""
        if self._refuses:
            raise self._refuses
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.is_open = False

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one batch."""
        assert self.is_open
        ids = inputs.get("task_ids")
        if ids is not None and (ids.dtype != np.int64 or ids.ndim != 1):
            raise EngineRunError(f"task_ids: {ids.dtype}", expected="int64 [B]")
        self.asked.append(inputs)
        return self._answer(inputs)


def oracle(dtype: str) -> FakeRunner:
    """Return the oracle, off by a known error in each dtype."""
    return FakeRunner(lambda inputs: {"logits": exact(inputs) + ERROR[dtype]})


def single(bound: BoundModel, answer: Answer, dtype: str = "fp32") -> Artefact:
    """Return a single graph that answers so."""
    return Artefact(
        name="single graph", kind="single-graph", runner=FakeRunner(answer), task=None,
        dtype=dtype, checkpoint_sha256=bound.adapters.checkpoint_sha256,
        base_sha256=bound.base.sha256,
    )  # fmt: skip


def merged(bound: BoundModel, task_index: int, answer: Answer) -> Artefact:
    """Return a merged artefact that answers so."""
    return replace(single(bound, answer), name="merged", kind="per-task", task=TASKS[task_index])


def right(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Answer as a correct single graph does: off by less than twice the floor."""
    return {"logits": exact(inputs) + 1.5e-6}


def right_for(task_index: int) -> Answer:
    """Return the answers of a correct merged artefact."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert "task_ids" not in inputs
        ids = np.full(len(inputs["input_ids"]), task_index)
        return {"logits": exact({**inputs, "task_ids": ids})[:, : WIDTHS[task_index]] + 1.5e-6}

    return answer


def judge(
    bound: BoundModel,
    cases: list[Case],
    *artefacts: Artefact,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """Return the report on these artefacts."""
    return run_parity(bound, artefacts, cases, tolerance=tolerance or Tolerance(), oracle=oracle)


def judged_by(
    runner: Runner, *exact: Reference, task: int | None = None, atol: float = 1e-6
) -> Judged:
    """Return an artefact with this runner, as checks get it: of all tasks, or of one."""
    model = marked.bound()
    kind = "single-graph" if task is None else "per-task"
    artefact = Artefact(
        "graph", kind, runner, None if task is None else TASKS[task], "fp32", "", ""
    )
    floors = {one.subject: 1e-6 for one in exact}
    found = Judged(model, artefact, list(exact), floors, Tolerance(atol=atol, rtol=0.0))
    return found if task is None else found.of_tasks([task])


def failed(report: ParityReport) -> list[Cell]:
    """Return the cells that failed."""
    return [cell for cell in report.cells if cell.verdict == "failed"]


def changed(change: Callable[[Array, Array], object]) -> Answer:
    """Return a right single graph whose logits ``change(logits, task_ids)`` spoils in place."""

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = right(inputs)["logits"]
        change(logits, inputs["task_ids"])
        return {"logits": logits}

    return answer
