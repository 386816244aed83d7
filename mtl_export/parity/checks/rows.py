"""What must hold whatever the numbers are: a row's answer is its own.

    bad task ids               unknown ids are refused, or give NaN in their own rows
    task ids of a wrong kind   another dtype or rank is refused, or gives NaN alone
    neighbours change task     a row is the same, bit for bit, whatever the others' tasks are
    rows permuted              the answers are permuted, and nothing else
    rows one by one            each row alone answers as it does among others
    padded further             more padding changes nothing      (inputs with an attention mask)
    beside padding only        a row that is padding only spoils none (likewise)
    padding only               NaN where the oracle answers NaN, and nowhere else

All but the last compare the artefact with itself, so these hold without an oracle. Batches of
other sizes and lengths are summed in another order: each side may be off by what is allowed.

T tasks, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BackendMissingError, MtlExportError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS
from mtl_export.parity.cases import FURTHER, ONE_BY_ONE, PADDING_ONLY, Case
from mtl_export.parity.judged import Judged
from mtl_export.parity.outputs import Subject, largest_error
from mtl_export.parity.report import Cell
from mtl_export.runtime.runners.language import NEW_TOKENS, PROMPT_TASK_IDS

WRONG_KIND = "task ids of a wrong kind"
MORE_PADDING = 3
Infer = Callable[[Mapping[str, Array]], Array | None]


def routing_cells(judged: Judged) -> list[Cell]:
    """Return the cells on the task ids of a single graph; none of an artefact of one task."""
    if not judged.artefact.serves_all:
        return []
    one = judged.widest
    return [
        bad_ids_cell(judged, one.case, one.subject),
        _wrong_kind_cell(judged, one.case, one.subject.output),
        _isolation_cell(judged, one.case, one.subject.output),
    ]


def row_cells(judged: Judged) -> list[Cell]:
    """Return one cell for each check that compares rows with the same rows in another batch."""
    one, cell, left_out = judged.widest, judged.artefact.cell(), judged.extra.left_out
    case, output = one.case, judged.output(one)

    def infer(inputs: Mapping[str, Array]) -> Array | None:
        return judged.artefact.infer(inputs).get(output)

    whole = infer(case.inputs)
    expected = (len(case.task_ids), *one.logits.shape[1:])
    # The last dimension is as wide as the artefact's own tasks need.
    if whole is None or (whole.ndim, whole.shape[:-1]) != (len(expected), expected[:-1]):
        return [cell.judged("rows", _misshapen(output, whole, expected))]
    checks: dict[str, Callable[[Case, Infer], Array | None]] = {
        "rows permuted": _permuted,
        ONE_BY_ONE: _alone,
    }
    if {INPUT_IDS, ATTENTION_MASK} <= case.inputs.keys():
        checks |= {FURTHER: _padded, "beside padding only": _beside_padding}
    cells, limit = [], 2 * judged.limit(one)
    for name, check in checks.items():
        if name in left_out:
            continue
        found = check(case, infer)
        if found is not None and name == FURTHER and whole.ndim > 2:
            found = found[:, : whole.shape[1]]
        error = largest_error(case, whole, found)
        is_number = np.isfinite(error)
        size = f"by {error:.3g}; allowed {limit:.3g}" if is_number else "in shape or to NaN"
        judgement = cell.judged(name, "" if error <= limit else f"answers change {size}")
        cells.append(replace(judgement, max_abs_error=error if is_number else None, limit=limit))
    return cells


def bad_ids_cell(judged: Judged, case: Case, subject: Subject, *, prompt: int = 0) -> Cell:
    """Return the cell that says whether unknown ids are kept from answering.

    Args:
        judged: A single graph.
        case: Its first row is run under its own id and under every bad one.
        subject: Which output is looked at.
        prompt: Of a language model's steps: so many answers are to the prompt, which is read
            under the good id; 0 for any other batch.
    """
    name = "bad task ids, step" if prompt else "bad task ids"
    cell, bad = judged.artefact.cell(), judged.bad_ids
    good = case.rows(np.arange(1))
    inputs = {name: np.repeat(value, len(bad) + 1, axis=0) for name, value in good.items()}
    if prompt:
        inputs[PROMPT_TASK_IDS] = inputs[TASK_IDS]
    inputs[TASK_IDS] = np.concatenate([good[TASK_IDS], bad])
    try:
        logits = judged.artefact.infer(inputs).get(subject.output)
    except BackendMissingError:
        raise
    except MtlExportError:
        return cell.judged(name)  # refusing the whole batch is as good as poisoning the rows
    shape = next(
        one.logits.shape[1:]
        for one in judged.exact
        if (one.case.name, one.subject) == (case.name, subject)
    )
    if logits is None or logits.shape != (len(bad) + 1, *shape):
        return cell.judged(name, _misshapen(subject.output, logits, (len(bad) + 1, *shape)))
    if np.isnan(logits[0]).any() or np.isnan(logits[:, :prompt]).any():
        also = ", or the prompt" if prompt else ""
        return cell.judged(name, f"they spoil the good row beside them{also}")
    answered = ~np.isnan(logits[1:, prompt:]).reshape(len(bad), -1).all(axis=1)
    reason = f"ids {bad[answered].tolist()} are answered" if answered.any() else ""
    return cell.judged(name, reason)


def padding_only_cells(judged: Judged) -> list[Cell]:
    """Return the cell that says whether rows of padding answer NaN as the oracle does."""
    padding = judged.extra.padding
    if padding is None:
        return []
    outputs = judged.artefact.infer(padding.inputs)
    problems = []
    for name, expected in padding.is_nan.items():
        found = outputs.get(name)
        if found is None or found.ndim != 2 or len(found) != len(expected):
            problems.append(f"no {name} of one row each")
            continue
        # A merged model is as wide as its task, the oracle as the widest.
        width = min(found.shape[1], expected.shape[1])
        differ = np.flatnonzero((np.isnan(found)[:, :width] != expected[:, :width]).any(axis=1))
        if differ.size:
            says = "numbers" if expected[differ[0]].any() else "NaN"
            problems.append(f"{name} is {says} in rows {differ.tolist()}, the oracle's is not")
    return [judged.artefact.cell().judged(PADDING_ONLY, "; ".join(problems))]


def _wrong_kind_cell(judged: Judged, case: Case, output: str) -> Cell:
    """Return the cell that says whether ids that are no int64 [B] are kept from answering."""
    ids = case.task_ids
    wrong: dict[str, Array] = {
        "int32": ids.astype(np.int32),
        "float32": ids.astype(np.float32),
        "a column": ids[:, None],
        "a number": np.array(ids[0]),
    }
    answered = []
    for name, value in wrong.items():
        try:
            found = judged.artefact.infer({**case.inputs, TASK_IDS: value}).get(output)
        except BackendMissingError:
            raise
        except MtlExportError:
            continue
        if found is None or not np.isnan(found).all():
            answered.append(name)
    reason = f"ids that are {', '.join(answered)} are answered" if answered else ""
    return judged.artefact.cell().judged(WRONG_KIND, reason)


def _isolation_cell(judged: Judged, case: Case, output: str) -> Cell:
    """Return the cell that says whether a row is the same whatever tasks its neighbours have."""
    artefact, task_count = judged.artefact, len(judged.tasks)
    cell, name = artefact.cell(), "neighbours change task"
    before = artefact.infer(case.inputs).get(output)
    if before is None:
        return cell.judged(name, f"no output {output!r}")
    disturbed = []
    for row in range(min(len(before), task_count)):
        ids = (case.task_ids + 1) % task_count
        ids[row] = case.task_ids[row]
        after = artefact.infer({**case.inputs, TASK_IDS: ids})[output]
        if not np.array_equal(after[row], before[row]):
            disturbed.append(row)
    reason = f"rows {disturbed} change bit for bit when the other rows' tasks do"
    return cell.judged(name, reason if disturbed and task_count > 1 else "")


def _misshapen(output: str, found: Array | None, expected: tuple[int, ...]) -> str:
    says = "is missing" if found is None else f"has shape {list(found.shape)}"
    return f"{output} {says}, not {list(expected)}"


def _permuted(case: Case, infer: Infer) -> Array | None:
    order = np.roll(np.arange(len(case.task_ids))[::-1], 1)
    found = infer(case.rows(order))
    return None if found is None else found[np.argsort(order)]


def _alone(case: Case, infer: Infer) -> Array | None:
    rows = np.arange(len(case.task_ids))
    parts = [infer(case.rows(rows[row : row + 1])) for row in rows]
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if len(there) == len(parts) else None


def _padded(case: Case, infer: Infer) -> Array | None:
    shape = case.inputs[ATTENTION_MASK].shape
    return infer({
        name: np.pad(value, ((0, 0), (0, MORE_PADDING)))
        if name != NEW_TOKENS and value.shape == shape
        else value
        for name, value in case.inputs.items()
    })  # fmt: skip


def _beside_padding(case: Case, infer: Infer) -> Array | None:
    more = {name: np.concatenate([value, value[:1]]) for name, value in case.inputs.items()}
    more[ATTENTION_MASK][-1] = 0
    found = infer(more)
    return None if found is None else found[:-1]
