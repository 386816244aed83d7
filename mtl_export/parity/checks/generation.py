"""What a language model must get right besides the prompt: every step, and what it says.

    steps      tokens that nobody chose, fed one by one; the logits of each step are compared
               with the oracle's, which knows no cache (``logits``)
    tokens     what greedy decoding says, against transformers' ``generate``
    bad ids    a good prompt that goes on under an id outside [0, T) (``rows``)

B rows, N new tokens, L vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.names import LOGITS
from mtl_export.parity.cases import MIXED, STEPS
from mtl_export.parity.checks.rows import bad_ids_cell
from mtl_export.parity.judged import Judged
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import GeneratedTokens
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.language import Generator

TOKENS = f"{STEPS} tokens, {MIXED}"


def token_cells(judged: Judged) -> list[Cell]:
    """Return one cell for each task served: whether the artefact says what the oracle says.

    Rows part for good at their first unequal token. It is a tie when the oracle's margin
    there is at most twice the limit, the error that each side may have. Of a single graph
    there is also a cell on bad ids that go on with a good prompt.
    """
    artefact, generated = judged.artefact, judged.extra.generated
    if generated is None:
        return []
    runner, ids = artefact.runner, generated.case.task_ids
    tasks = [task for task in judged.tasks if task.index in ids]
    if isinstance(runner, Generator):
        limit = judged.tolerance.of(LOGITS).factor * judged.floors[Subject(LOGITS)]
        inputs = artefact.given(generated.case.inputs)
        found = runner.generate(inputs, STEPS)
        cells = [
            _compared(artefact.cell(task.name), generated, found, ids == task.index, limit)
            for task in tasks
        ]
    else:
        reason = f"{runner.name} runs one graph, and generation takes two"
        cells = [artefact.cell(task.name).not_run(TOKENS, reason) for task in tasks]
    if artefact.serves_all:
        cells.append(bad_ids_cell(judged, generated.case, Subject(LOGITS), prompt=1))
    return cells


def _compared(
    cell: Cell, generated: GeneratedTokens, found: Array, rows: Array, limit: float
) -> Cell:
    """Return the cell on the tokens of a task's ``rows``."""
    total = equal = ties = 0
    reason = ""
    for row in np.flatnonzero(rows):
        total += STEPS
        same = generated.tokens[row] == found[row]
        first = STEPS if same.all() else int(same.argmin())
        equal += first
        if first < STEPS and generated.margins[row, first] <= 2 * limit:
            ties += STEPS - first
        elif first < STEPS and not reason:
            reason = (
                f"token {first} of row {row} is {found[row, first]}, not "
                f"{generated.tokens[row, first]}, "
                f"which leads by {generated.margins[row, first]:.3g}"
            )
    return replace(cell.judged(TOKENS, reason), decisions=(total, equal, ties))
