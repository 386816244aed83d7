"""The batches that are compared: real rows, mixed tasks, and shapes nobody traced.

Three presets say how much is compared, each with all that the one before it has:

    quick      a batch of each task, one of all tasks mixed (of language models also the steps
               and tokens that follow); ids that no task has, neighbours, permuted rows, other
               tasks' tensors, stored tensors
    standard   also single rows, small, odd, long and full-length batches, padding on the left,
               rows of nothing but padding, rows one by one, every layer, zeroed adapters
    full       also batches and lengths around powers of two, and more seeds

What a preset leaves out is not run, and is said: by name, under every artefact.

Texts are int64 ``[B, S]``, images ``[B, C, H, W]``; H and W are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mtl_export.checkpoint.own_classes import own_class
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError, UsageError
from mtl_export.names import ATTENTION_MASK, DECODER_INPUT_IDS, INPUT_IDS, TASK_IDS
from mtl_export.runtime.runners.language import NEW_TOKENS
from mtl_export.runtime.runners.seq2seq import first_token

Preset = Literal["quick", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("quick", "standard", "full")
# Checks that take long are left out of the quick preset; all others belong to every one.
PADDING_ONLY = "padding only"
ONE_BY_ONE, FURTHER = "rows one by one", "padded further"
LAYERS, ZEROED = "every layer counts", "zeroed adapters"
STANDARD_CHECKS = (ONE_BY_ONE, FURTHER, PADDING_ONLY, LAYERS, ZEROED)
# Neither is ever a traced size, nor a power of two.
ODD_BATCH, LONG_SEQUENCE = 5, 97
MIXED_ROWS = 16
MIXED, ONE_ROW, LONG = "mixed tasks", "one row of task ", "batch "
# Batches of these sizes are cut from the mixed one: a graph may be right at all but one size.
SMALL_BATCHES = (2, 3, 7)
# Positions up to here are used, where the model has them; beyond, only time is.
LONGEST_SEQUENCE = 512
# Of the full preset: one token, two, and both sides of powers of two.
FULL_BATCHES = (9, 33, 16, 17, 8, 65)
FULL_LENGTHS = (1, 2, 31, 32, 129, 33)
FULL_SEEDS = (2, 3, 4)
# Tokens that follow a prompt; of an encoder-decoder's long batches, odd and more than is traced.
STEPS, LONG_STEPS = 8, 13
NO_FEATURES: Mapping[str, tuple[int, ...]] = MappingProxyType({})


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        name: As reports print it.
        inputs: By name, with ``task_ids`` int64 [B].
        preset: The smallest of ``PRESETS`` that has it.
    """

    name: str
    inputs: Mapping[str, Array]
    preset: Preset = "standard"

    @property
    def task_ids(self) -> Array:
        """Return the task of each row."""
        return self.inputs[TASK_IDS]

    def rows(self, chosen: Array) -> dict[str, Array]:
        """Return the inputs of the rows where ``chosen`` holds, or that it numbers."""
        return {name: value[chosen] for name, value in self.inputs.items()}


@dataclass(frozen=True)
class RowLimits:
    """What rows may hold.

    Attributes:
        task_count: T.
        vocabulary: Token ids lie in [0, vocabulary).
        longest: Longest sequence the model takes.
        token_types: ``token_type_ids`` lie in [0, token_types).
    """

    task_count: int
    vocabulary: int
    longest: int = LONGEST_SEQUENCE
    token_types: int = 1


def preset_of(quick: bool, full: bool) -> Preset:
    """Return the preset that the two switches mean.

    Raises:
        UsageError: Both are on.
    """
    if quick and full:
        raise UsageError("--quick and --full: both", expected="one of them", fix="Leave one out")
    return "quick" if quick else "full" if full else "standard"


def choose(cases: Sequence[Case], preset: Preset) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of ``preset``, and why each other case or check is left out, by name."""
    most = PRESETS.index(preset)
    taken = [case for case in cases if PRESETS.index(case.preset) <= most]
    left_out: dict[str, str] = {}
    if preset == "quick":
        names = [case.name for case in cases if case.preset == "standard"]
        left_out = dict.fromkeys([*names, *STANDARD_CHECKS], "left out by --quick")
    more = sum(case.preset == "full" for case in cases)
    if preset != "full" and more:
        left_out[f"{more} more batches"] = "left out without --full"
    return taken, left_out


def seeded_rows(
    limits: RowLimits,
    names: Sequence[str],
    *,
    per_task: int = 4,
    seed: int = 0,
    features: Mapping[str, tuple[int, ...]] = NO_FEATURES,
) -> dict[str, Array]:
    """Return rows of random ids inside the vocabularies, for want of real inputs.

    Args:
        limits: Of the model.
        names: The inputs that the model takes.
        per_task: Rows of each task.
        seed: Decides the values.
        features: Shape of one row of every input that is no text, such as ``pixel_values``.
    """
    generator = np.random.default_rng(seed)
    shape = (limits.task_count * per_task, 23)
    lengths = generator.integers(5, shape[1] + 1, shape[0])
    candidates: dict[str, Array] = {
        INPUT_IDS: generator.integers(0, limits.vocabulary, shape, dtype=np.int64),
        ATTENTION_MASK: (np.arange(shape[1]) < lengths[:, None]).astype(np.int64),
        "token_type_ids": generator.integers(0, limits.token_types, shape, dtype=np.int64),
    }
    rows = {name: candidates[name] for name in names if name in candidates}
    for name, size in features.items():
        # As processors of images and sounds give them: mean 0 and variance 1 over all rows.
        rows[name] = generator.standard_normal((shape[0], *size), dtype=np.float32)
    rows[TASK_IDS] = np.tile(np.arange(limits.task_count, dtype=np.int64), per_task)
    return rows


def build_cases(
    rows: Mapping[str, Array], limits: RowLimits, *, are_given: bool = False
) -> list[Case]:
    """Return the cases of the standard preset.

    Args:
        rows: Tokenised rows, padded to one length, with ``task_ids``; every task occurs.
        limits: Of the model.
        are_given: No other rows may be made up: what their tokens mean is not known.

    Raises:
        ParityError: A task has no row, or an id is out of range.
    """
    ids, task_count = rows[TASK_IDS], limits.task_count
    absent = sorted(set(range(task_count)) - set(ids.tolist()))
    if absent or ids.min() < 0 or ids.max() >= task_count:
        raise ParityError(
            f"parity inputs: task ids {sorted(set(ids.tolist()))}; tasks without a row: {absent}",
            expected=f"every id from 0 to {task_count - 1} and no other",
            fix="Add a row for each task to the inputs",
        )
    given = Case("", rows)
    by_task = [np.flatnonzero(ids == task) for task in range(task_count)]
    mixed = _interleaved(by_task)
    chosen = {f"task {task}": own for task, own in enumerate(by_task)}
    chosen |= {f"{ONE_ROW}{task}": own[:1] for task, own in enumerate(by_task)}
    chosen[MIXED] = mixed
    chosen |= {f"{MIXED}, batch {n}": mixed[-n:] for n in SMALL_BATCHES if n < len(mixed)}
    quick = {*list(chosen)[:task_count], MIXED}
    cases = [
        Case(name, _trimmed(given.rows(index)), "quick" if name in quick else "standard")
        for name, index in chosen.items()
    ]
    if are_given or INPUT_IDS not in rows:  # the size of images and sounds is given
        return [*cases, _odd_batch(rows, task_count)]
    if ATTENTION_MASK in rows:
        cases.append(Case(f"{MIXED}, padded left", _padded_left(_trimmed(given.rows(mixed)))))
    ragged = max(ODD_BATCH, 2 * task_count) | 1
    cases.append(_long_case(rows, limits, ragged, min(LONG_SEQUENCE, limits.longest)))
    if limits.longest > LONG_SEQUENCE:
        full = min(limits.longest, LONGEST_SEQUENCE)
        cases.append(_long_case(rows, limits, task_count, full))
    return cases


def more_cases(
    rows: Mapping[str, Array], limits: RowLimits, *, are_given: bool = False
) -> list[Case]:
    """Return what the full preset has besides ``build_cases``; arguments as there."""
    task_count, longest = limits.task_count, limits.longest
    if are_given or INPUT_IDS not in rows:
        return [replace(_odd_batch(rows, task_count, FULL_BATCHES[-1]), preset="full")]
    found = [
        _long_case(rows, limits, max(batch, task_count), length)
        for batch, length in zip(FULL_BATCHES, FULL_LENGTHS, strict=True)
        if length <= longest
    ]
    for seed in FULL_SEEDS:
        one = _long_case(rows, limits, max(11, task_count), min(longest, 20 + seed), seed)
        found.append(replace(one, name=f"{one.name}, seed {seed}"))
    return [replace(case, preset="full") for case in found]


def step_cases(cases: Sequence[Case], limits: RowLimits) -> list[Case]:
    """Return a language model's prompts of the mixed and the long batch, with seeded new tokens.

    Args:
        cases: From ``build_cases``.
        limits: Of the model; its longest sequence holds prompt and new tokens.
    """
    generator = np.random.default_rng(2)
    mixed = next(case for case in cases if case.name == MIXED)
    long = next(case for case in cases if case.name.startswith(LONG))
    found = []
    for case in (mixed, long):
        prompts = {
            name: case.inputs[name][:, : limits.longest - STEPS]
            for name in (INPUT_IDS, ATTENTION_MASK)
        }
        shape = (len(case.task_ids), STEPS)
        tokens = generator.integers(0, limits.vocabulary, shape, dtype=np.int64)
        inputs = {**prompts, TASK_IDS: case.task_ids, NEW_TOKENS: tokens}
        found.append(Case(f"{STEPS} steps, {case.name}", inputs, case.preset))
    return found


def decoder_cases(
    cases: Sequence[Case], model_class: str, config: Mapping[str, Any], vocabulary: int
) -> list[Case]:
    """Return an encoder-decoder's cases: with seeded tokens that the decoder reads.

    All are full tokens: the decoder has no padding, and each of its logits counts.

    Args:
        cases: From ``build_cases``.
        model_class: The class of the model, which may read more than text.
        config: Its ``config.json``.
        vocabulary: Token ids lie in [0, vocabulary).
    """
    generator = np.random.default_rng(3)
    own = own_class(model_class)
    found = []
    for case in cases:
        rows = len(case.task_ids)
        count = LONG_STEPS if case.name.startswith(LONG) else STEPS
        tokens = generator.integers(0, vocabulary, (rows, count), dtype=np.int64)
        others = own.seeded_inputs(config, rows) if own is not None else {}
        inputs = {NEW_TOKENS: tokens, **case.inputs, **others}
        if DECODER_INPUT_IDS in inputs:
            given = inputs.pop(DECODER_INPUT_IDS)
            begun = given[:, 1:] if (given[:, 0] == first_token(config)).all() else given
            # What follows the last token that a user gave is not compared.
            inputs[NEW_TOKENS] = np.pad(begun, ((0, 0), (0, 1)))
        found.append(replace(case, inputs=inputs))
    return found


def _padded_left(rows: dict[str, Array]) -> dict[str, Array]:
    """Return the rows with their padding before their tokens."""
    mask = rows[ATTENTION_MASK]
    order = np.argsort(mask != 0, axis=1, kind="stable")
    return {
        name: np.take_along_axis(value, order, axis=1) if value.shape == mask.shape else value
        for name, value in rows.items()
    }


def _trimmed(rows: dict[str, Array]) -> dict[str, Array]:
    """Drop the columns that are padding in every row, as a tokeniser would have."""
    if ATTENTION_MASK not in rows:
        return rows
    used = int(np.flatnonzero(rows[ATTENTION_MASK].any(axis=0)).max(initial=0)) + 1
    shape = rows[ATTENTION_MASK].shape
    return {name: v[:, :used] if v.shape == shape else v for name, v in rows.items()}


def _interleaved(by_task: Sequence[Array]) -> Array:
    """Return up to MIXED_ROWS of the row numbers, the tasks taking turns."""
    turns = range(max(map(len, by_task)))
    order = [rows[turn] for turn in turns for rows in by_task if turn < len(rows)]
    return np.array(order[: max(MIXED_ROWS, len(by_task))])


def _odd_batch(rows: Mapping[str, Array], task_count: int, least: int = ODD_BATCH) -> Case:
    """Return a batch of an odd size, every task in it, of the rows again and again."""
    batch = max(least, 2 * task_count) | 1
    inputs = {name: np.resize(value, (batch, *value.shape[1:])) for name, value in rows.items()}
    inputs[TASK_IDS] = np.arange(batch, dtype=np.int64) % task_count
    return Case(f"{LONG}{batch}", inputs)


def _long_case(
    rows: Mapping[str, Array], limits: RowLimits, batch: int, length: int, seed: int = 1
) -> Case:
    """Return a seeded batch: a whole row of every task, then ragged ones."""
    generator = np.random.default_rng(seed)
    mask = np.arange(length) < generator.integers(max(1, length // 2), length + 1, batch)[:, None]
    mask[: limits.task_count] = True
    ends = {INPUT_IDS: limits.vocabulary, "token_type_ids": limits.token_types}
    inputs: dict[str, Array] = {}
    for name, value in rows.items():
        if name == TASK_IDS:
            inputs[name] = np.arange(batch, dtype=np.int64) % limits.task_count
        elif name in ends:
            inputs[name] = generator.integers(0, ends[name], (batch, length), dtype=value.dtype)
        elif name == ATTENTION_MASK:
            inputs[name] = mask.astype(value.dtype)
        elif value.ndim > 2:  # no text: as many rows as there are, again and again
            inputs[name] = np.resize(value, (batch, *value.shape[1:]))
        else:
            inputs[name] = np.zeros((batch, length), value.dtype)
    return Case(f"{LONG}{batch} x {length}", inputs)
