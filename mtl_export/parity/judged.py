"""What one artefact is judged by; every check takes this record and returns cells."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from mtl_export.adapters.binding import BoundModel
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.names import TASK_IDS
from mtl_export.parity.artefact import Artefact
from mtl_export.parity.cases import Case
from mtl_export.parity.reference import ExtraChecks, Floors, Reference, widest
from mtl_export.parity.report import Cell
from mtl_export.parity.tolerance import Tolerance

# No task has these ids; the last wraps to 1 in a runtime that narrows ids to int32.
BAD_IDS = (-1, 2**32 + 1, 2**63 - 1)


@dataclass(frozen=True)
class Judged:
    """One artefact, and what it is judged by.

    Attributes:
        bound: The checkpoint and its base.
        artefact: What is judged; its runner is open where a check runs it.
        exact: What the oracle answers to rows of its tasks.
        floors: Noise floors of the dtype that it computes in.
        tolerance: What is allowed.
        threads: Of ONNX Runtime; 0 lets it decide.
        extra: What is compared besides the cases.
        is_alone: Only its own file is looked at, not those in its folder.
    """

    bound: BoundModel
    artefact: Artefact
    exact: list[Reference]
    floors: Floors
    tolerance: Tolerance
    threads: int = 0
    extra: ExtraChecks = field(default_factory=ExtraChecks)
    is_alone: bool = False

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Return the tasks that the artefact serves."""
        task = self.artefact.task
        return (task,) if task else tuple(self.bound.adapters.tasks)

    @property
    def widest(self) -> Reference:
        """Return the oracle's answer that checks of single rows look at."""
        # One with a column for each row of the batch is no row's own answer.
        return widest([one for one in self.exact if not one.subject.is_across_rows])

    @property
    def bad_ids(self) -> Array:
        """Return int64 ids that no task has."""
        return np.array([*BAD_IDS, len(self.bound.adapters.tasks)], np.int64)

    def output(self, one: Reference) -> str:
        """Return what the artefact calls an output of the oracle."""
        return one.subject.output if self.artefact.task is None else one.subject.merged_output

    def limit(self, one: Reference) -> float:
        """Return the largest error that is allowed anywhere in an answer."""
        finite = one.logits[np.isfinite(one.logits)]
        allowed = self.tolerance.of(one.subject.output).allowed(finite, self.floors[one.subject])
        return float(allowed.max(initial=0.0))

    def not_run(self, case: str, reason: str) -> Cell:
        """Return a cell for what was not run, and why."""
        return self.artefact.cell().not_run(case, reason)

    def of_tasks(self, ids: Collection[int]) -> Judged:
        """Return the same with the rows of these tasks alone."""
        cases: dict[int, tuple[Case, Array]] = {}
        exact = []
        for one in self.exact:
            if id(one.case) not in cases:
                rows = np.isin(one.case.task_ids, list(ids))
                cases[id(one.case)] = replace(one.case, inputs=one.case.rows(rows)), rows
            case, rows = cases[id(one.case)]
            if rows.any():
                exact.append(replace(one, case=case, logits=one.logits[rows]))
        padding, generated = self.extra.padding, self.extra.generated
        if padding is not None:
            rows = np.isin(padding.inputs[TASK_IDS], list(ids))
            inputs, is_nan = (
                {name: value[rows] for name, value in values.items()}
                for values in (padding.inputs, padding.is_nan)
            )
            padding = replace(padding, inputs=inputs, is_nan=is_nan) if rows.any() else None
        if generated is not None:
            rows = np.isin(generated.case.task_ids, list(ids))
            case = replace(generated.case, inputs=generated.case.rows(rows))
            generated = (
                replace(generated, case=case, tokens=generated.tokens[rows],
                        margins=generated.margins[rows]) if rows.any() else None
            )  # fmt: skip
        extra = replace(self.extra, padding=padding, generated=generated)
        return replace(self, exact=exact, extra=extra)
