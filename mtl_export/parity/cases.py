"""The batches that are compared: real rows, mixed tasks, and shapes nobody traced.

Texts are int64 ``[B, S]``, images ``[B, C, H, W]``; H and W are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError
from mtl_export.names import ATTENTION_MASK, INPUT_IDS, TASK_IDS

# Neither is ever a traced size, nor a power of two.
ODD_BATCH, LONG_SEQUENCE = 5, 97
MIXED_ROWS = 16
MIXED, ONE_ROW = "mixed tasks", "one row of task "
# Batches of these sizes are cut from the mixed one: a graph may be right at all but one size.
SMALL_BATCHES = (2, 3, 7)
# Positions up to here are used, where the model has them; beyond, only time is.
LONGEST_SEQUENCE = 512
# Of the full preset: one token, two, and both sides of powers of two.
FULL_BATCHES = (9, 33, 16, 17, 8, 65)
FULL_LENGTHS = (1, 2, 31, 32, 129, 33)
FULL_SEEDS = (2, 3, 4)
NO_FEATURES: Mapping[str, tuple[int, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        name: As reports print it.
        inputs: By name, with ``task_ids`` int64 [B].
        preset: The smallest of ``presets`` that has it.
    """

    name: str
    inputs: Mapping[str, Array]
    preset: Literal["quick", "standard", "full"] = "standard"

    @property
    def task_ids(self) -> Array:
        """Return the task of each row."""
        return self.inputs[TASK_IDS]

    def rows(self, chosen: Array) -> dict[str, Array]:
        """Return the inputs of the rows where the boolean ``chosen`` holds."""
        return {name: value[chosen] for name, value in self.inputs.items()}


def seeded_rows(
    *,
    task_count: int,
    vocabulary: int,
    names: Sequence[str],
    token_types: int = 1,
    per_task: int = 4,
    seed: int = 0,
    features: Mapping[str, tuple[int, ...]] = NO_FEATURES,
) -> dict[str, Array]:
    """Return rows of random ids inside the vocabularies, for want of real inputs.

    Args:
        task_count: T.
        vocabulary: Token ids lie in [0, vocabulary).
        names: The inputs that the model takes.
        token_types: ``token_type_ids`` lie in [0, token_types).
        per_task: Rows of each task.
        seed: Decides the values.
        features: Shape of one row of every input that is no text, such as ``pixel_values``.
    """
    generator = np.random.default_rng(seed)
    shape = (task_count * per_task, 23)
    lengths = generator.integers(5, shape[1] + 1, shape[0])
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    candidates: dict[str, Array] = {
        INPUT_IDS: generator.integers(0, vocabulary, shape, dtype=np.int64),
        ATTENTION_MASK: mask,
        "token_type_ids": generator.integers(0, token_types, shape, dtype=np.int64),
    }
    rows = {name: candidates[name] for name in names if name in candidates}
    for name, size in features.items():
        # As processors of images and sounds give them: mean 0 and variance 1 over all rows.
        rows[name] = generator.standard_normal((shape[0], *size), dtype=np.float32)
    rows[TASK_IDS] = np.tile(np.arange(task_count, dtype=np.int64), per_task)
    return rows


def build_cases(
    rows: Mapping[str, Array],
    *,
    task_count: int,
    vocabulary: int,
    longest: int,
    token_types: int = 1,
    are_given: bool = False,
) -> list[Case]:
    """Return the cases that every artefact is run on.

    Args:
        rows: Tokenised rows, padded to one length, with ``task_ids``; every task occurs.
        task_count: T.
        vocabulary: Token ids lie in [0, vocabulary).
        longest: Longest sequence the model takes.
        token_types: ``token_type_ids`` lie in [0, token_types).
        are_given: No other rows may be made up: what their tokens mean is not known.

    Raises:
        ParityError: A task has no row, or an id is out of range.
    """
    ids = rows[TASK_IDS]
    absent = sorted(set(range(task_count)) - set(ids.tolist()))
    if absent or ids.min() < 0 or ids.max() >= task_count:
        raise ParityError(
            f"parity inputs: task ids {sorted(set(ids.tolist()))}; tasks without a row: {absent}",
            expected=(
                f"every id from 0 to {task_count - 1} and no other, because a task that is not "
                "compared must not pass"
            ),
            fix="Add a row for each task to the inputs",
        )
    cases = [
        Case(f"task {task}", _trimmed(_pick(rows, np.flatnonzero(ids == task))), "quick")
        for task in range(task_count)
    ]
    cases += [
        Case(f"{ONE_ROW}{task}", _trimmed(_pick(rows, np.flatnonzero(ids == task)[:1])))
        for task in range(task_count)
    ]
    mixed = _interleaved(ids, task_count)
    cases.append(Case(MIXED, _trimmed(_pick(rows, mixed)), "quick"))
    cases += [
        Case(f"{MIXED}, batch {size}", _trimmed(_pick(rows, mixed[-size:])))
        for size in SMALL_BATCHES
        if size < len(mixed)
    ]
    if are_given or INPUT_IDS not in rows:  # the size of images and sounds is given
        return [*cases, _odd_batch(rows, task_count)]
    if ATTENTION_MASK in rows:
        whole = _trimmed(_pick(rows, mixed))
        cases.append(Case(f"{MIXED}, padded left", _padded_left(whole)))
    limits = {INPUT_IDS: vocabulary, "token_type_ids": token_types}
    ragged = max(ODD_BATCH, 2 * task_count) | 1
    cases.append(_long_case(rows, task_count, limits, ragged, min(LONG_SEQUENCE, longest)))
    if longest > LONG_SEQUENCE:
        full = min(longest, LONGEST_SEQUENCE)
        cases.append(_long_case(rows, task_count, limits, task_count, full))
    return cases


def more_cases(
    rows: Mapping[str, Array],
    *,
    task_count: int,
    vocabulary: int,
    longest: int,
    token_types: int = 1,
    are_given: bool = False,
) -> list[Case]:
    """Return what a patient user runs besides ``build_cases``; arguments as there."""
    if are_given or INPUT_IDS not in rows:
        return [replace(_odd_batch(rows, task_count, FULL_BATCHES[-1]), preset="full")]
    limits = {INPUT_IDS: vocabulary, "token_type_ids": token_types}
    batches = [max(batch, task_count) for batch in FULL_BATCHES]
    sizes = [(batch, length) for batch, length in zip(batches, FULL_LENGTHS, strict=True)]
    found = [
        _long_case(rows, task_count, limits, batch, length)
        for batch, length in sizes
        if length <= longest
    ]
    for seed in FULL_SEEDS:
        length = min(longest, 20 + seed)
        one = _long_case(rows, task_count, limits, max(11, task_count), length, seed)
        found.append(Case(f"{one.name}, seed {seed}", one.inputs))
    return [replace(case, preset="full") for case in found]


def _padded_left(rows: dict[str, Array]) -> dict[str, Array]:
    """Return the rows with their padding before their tokens."""
    mask = rows[ATTENTION_MASK]
    order = np.argsort(mask != 0, axis=1, kind="stable")
    return {
        name: np.take_along_axis(value, order, axis=1) if value.shape == mask.shape else value
        for name, value in rows.items()
    }


def _pick(rows: Mapping[str, Array], index: Array) -> dict[str, Array]:
    return {name: value[index] for name, value in rows.items()}


def _trimmed(rows: dict[str, Array]) -> dict[str, Array]:
    """Drop the columns that are padding in every row, as a tokeniser would have."""
    if ATTENTION_MASK not in rows:
        return rows
    used = int(np.flatnonzero(rows[ATTENTION_MASK].any(axis=0)).max(initial=0)) + 1
    shape = rows[ATTENTION_MASK].shape
    return {name: v[:, :used] if v.shape == shape else v for name, v in rows.items()}


def _interleaved(ids: Array, task_count: int) -> Array:
    """Return up to MIXED_ROWS row numbers, the tasks taking turns."""
    queues = [np.flatnonzero(ids == task).tolist() for task in range(task_count)]
    order = [
        queue[turn]
        for turn in range(max(map(len, queues)))
        for queue in queues
        if turn < len(queue)
    ]
    return np.array(order[: max(MIXED_ROWS, task_count)])


def _odd_batch(rows: Mapping[str, Array], task_count: int, least: int = ODD_BATCH) -> Case:
    """Return a batch of an odd size, every task in it, of the rows again and again."""
    batch = max(least, 2 * task_count) | 1
    inputs = {name: np.resize(value, (batch, *value.shape[1:])) for name, value in rows.items()}
    inputs[TASK_IDS] = np.arange(batch, dtype=np.int64) % task_count
    return Case(f"batch {batch}", inputs)


def _long_case(
    rows: Mapping[str, Array],
    task_count: int,
    limits: Mapping[str, int],
    batch: int,
    length: int,
    seed: int = 1,
) -> Case:
    """Return a seeded batch: a whole row of every task, then ragged ones.

    ``limits`` gives the ids' upper end by input.
    """
    generator = np.random.default_rng(seed)
    mask = np.arange(length) < generator.integers(max(1, length // 2), length + 1, batch)[:, None]
    mask[:task_count] = True
    inputs: dict[str, Array] = {}
    for name, value in rows.items():
        if name == TASK_IDS:
            inputs[name] = np.arange(batch, dtype=np.int64) % task_count
        elif name in limits:
            inputs[name] = generator.integers(0, limits[name], (batch, length), dtype=value.dtype)
        elif name == ATTENTION_MASK:
            inputs[name] = mask.astype(value.dtype)
        elif value.ndim > 2:  # no text: as many rows as there are, again and again
            inputs[name] = np.resize(value, (batch, *value.shape[1:]))
        else:
            inputs[name] = np.zeros((batch, length), value.dtype)
    return Case(f"batch {batch} x {length}", inputs)
