from __future__ import annotations

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import ParityError
from mtl_export.graph.trace import SAMPLE_BATCH, SAMPLE_SEQUENCE
from mtl_export.parity.cases import (
    MIXED_ROWS,
    PRESETS,
    Case,
    Preset,
    RowLimits,
    build_cases,
    choose,
    more_cases,
    seeded_rows,
)

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def cases_of(task_count: int, *, longest: int = 512, per_task: int = 4) -> list[Case]:
    """Return the cases made of seeded rows."""
    rows = seeded_rows(RowLimits(task_count, 31), NAMES, per_task=per_task)
    return build_cases(rows, RowLimits(task_count, 31, longest))


def test_seeded_rows_are_valid_and_repeat() -> None:
    """Rows lie inside the vocabulary, are ragged, cover every task, and never change."""
    first, second = (seeded_rows(RowLimits(3, 31), NAMES) for _ in range(2))
    assert set(first) == {*NAMES, "task_ids"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
        assert value.dtype == np.int64
    assert first["input_ids"].min() >= 0
    assert first["input_ids"].max() < 31
    lengths = first["attention_mask"].sum(axis=1)
    assert lengths.min() >= 1
    assert len(set(lengths.tolist())) > 1
    assert np.bincount(first["task_ids"]).tolist() == [4, 4, 4]


def test_seeded_rows_have_only_the_models_inputs() -> None:
    """A model without token types gets none."""
    rows = seeded_rows(RowLimits(2, 31), ("input_ids", "pixel_values"))
    assert set(rows) == {"input_ids", "task_ids"}


@pytest.mark.parametrize("task_count", [1, 2, 3, 5, 20])
def test_every_task_is_compared_alone_in_one_row_and_mixed(task_count: int) -> None:
    """No task is left out of any kind of case."""
    cases = {case.name: case for case in cases_of(task_count)}
    for task in range(task_count):
        assert set(cases[f"task {task}"].task_ids.tolist()) == {task}
        assert cases[f"one row of task {task}"].task_ids.tolist() == [task]
    everything = set(range(task_count))
    mixed = cases["mixed tasks"].task_ids
    assert set(mixed.tolist()) == everything
    assert len(mixed) <= max(MIXED_ROWS, task_count)
    long = next(case for name, case in cases.items() if name.startswith("batch "))
    assert set(long.task_ids.tolist()) == everything
    for case in cases.values():
        assert {len(value) for value in case.inputs.values()} == {len(case.task_ids)}
        assert case.task_ids.dtype == np.int64


def test_tasks_take_turns_in_the_mixed_batch() -> None:
    """Neighbouring rows belong to different tasks."""
    mixed = next(case for case in cases_of(3) if case.name == "mixed tasks").task_ids
    assert (mixed[1:] != mixed[:-1]).all()


def test_sizes_are_not_those_traced() -> None:
    """One row, a few, an odd batch at a long odd length, and all positions: most untraced."""
    sizes = {tuple(case.inputs["input_ids"].shape) for case in cases_of(3)}
    batches = {batch for batch, _ in sizes}
    assert {1, 2, 3, 7} <= batches
    assert {(7, 97), (3, 512)} <= sizes
    assert batches - {SAMPLE_BATCH}
    assert all(length != SAMPLE_SEQUENCE for _, length in sizes)


def test_inputs_that_are_not_text_are_neither_cut_nor_emptied() -> None:
    """Image regions keep their number and values, whatever the text's length."""
    rows = seeded_rows(RowLimits(2, 50), NAMES)
    rows["vis_feats"] = np.random.default_rng(1).normal(size=(8, 30, 3))
    for case in build_cases(rows, RowLimits(2, 50, 64)):
        regions = case.inputs["vis_feats"]
        assert regions.shape == (len(case.task_ids), 30, 3)
        assert {row.tobytes() for row in regions} <= {row.tobytes() for row in rows["vis_feats"]}


@pytest.mark.parametrize("longest", [5, 40, 96, 512])
def test_the_long_case_fits_the_model(longest: int) -> None:
    """The longest case is as long as the model takes, ragged, never without a token."""
    ragged = next(case for case in cases_of(2, longest=longest) if case.name.startswith("batch"))
    mask = ragged.inputs["attention_mask"]
    assert mask.shape[1] == min(97, longest)
    assert mask[:2].all(), "every task has a row of full length"
    assert not mask[2:].all()
    assert mask.any(axis=1).all()
    assert ragged.inputs["input_ids"].max() < 31


@pytest.mark.parametrize(("longest", "length"), [(40, 40), (97, 97), (300, 300), (4096, 512)])
def test_every_task_is_run_at_the_models_full_length(longest: int, length: int) -> None:
    """Positions up to 512 are used by a whole row of each task."""
    cases = cases_of(3, longest=longest)
    whole = max(cases, key=lambda case: case.inputs["input_ids"].shape[1])
    mask = whole.inputs["attention_mask"]
    assert mask.shape[1] == length
    assert {int(t) for t, row in zip(whole.task_ids, mask, strict=True) if row.all()} == {0, 1, 2}


def test_token_types_are_used() -> None:
    """Seeded rows and long batches hold every token type, so that none can be ignored."""
    rows = seeded_rows(RowLimits(2, 31, token_types=2), NAMES)
    assert set(rows["token_type_ids"].ravel().tolist()) == {0, 1}
    cases = build_cases(rows, RowLimits(2, 31, 40, token_types=2))
    assert set(cases[-1].inputs["token_type_ids"].ravel().tolist()) == {0, 1}


def real_rows(task_ids: list[int]) -> dict[str, Array]:
    """Return rows of 9 columns whose last 4 are padding everywhere."""
    rows = len(task_ids)
    mask = np.zeros((rows, 9), np.int64)
    mask[:, :3] = 1
    mask[0, :5] = 1
    return {
        "input_ids": np.arange(rows * 9).reshape(rows, 9) % 31,
        "attention_mask": mask,
        "task_ids": np.array(task_ids),
    }


def test_rows_are_those_given_without_common_padding() -> None:
    """Real rows are used as they are, cut to the longest of their case."""
    rows = real_rows([1, 0, 1])
    cases = {case.name: case for case in build_cases(rows, RowLimits(2, 31, 64))}
    np.testing.assert_array_equal(cases["task 0"].inputs["input_ids"], rows["input_ids"][1:2, :3])
    np.testing.assert_array_equal(
        cases["task 1"].inputs["input_ids"], rows["input_ids"][[0, 2], :5]
    )
    assert cases["mixed tasks"].task_ids.tolist() == [0, 1, 1]


def test_inputs_without_a_mask_are_not_cut() -> None:
    """Without a mask every column counts."""
    rows = real_rows([0, 1])
    del rows["attention_mask"]
    case = build_cases(rows, RowLimits(2, 31, 64))[0]
    assert case.inputs["input_ids"].shape == (1, 9)


@pytest.mark.parametrize("ids", [[0, 0, 2], [0, 1], [0, 1, 2, 3], [0, 1, 2, -1], []])
def test_a_task_without_rows_is_refused(ids: list[int]) -> None:
    """A task that is not compared must not pass; neither may an unknown id."""
    with pytest.raises(ParityError) as caught:
        build_cases(real_rows(ids) if ids else {"task_ids": np.zeros(0, np.int64)},
                    RowLimits(3, 31, 64))  # fmt: skip
    assert caught.value.problem.startswith("parity inputs")
    assert "task ids" in caught.value.problem
    assert caught.value.expected.partition(", because ")[0] == "every id from 0 to 2 and no other"
    assert caught.value.fix


def test_rows_of_a_case_are_picked_together() -> None:
    """Picking rows picks them in every input."""
    case = Case("c", real_rows([0, 1, 2]))
    picked = case.rows(np.array([True, False, True]))
    assert picked["task_ids"].tolist() == [0, 2]
    np.testing.assert_array_equal(picked["input_ids"], case.inputs["input_ids"][[0, 2]])


def test_images_are_compared_at_their_own_size() -> None:
    """Seeded pixels of the model's size, every task in each mixed batch, an odd batch last."""
    rows = seeded_rows(RowLimits(3, 1), [], features={"pixel_values": (3, 4, 6)})
    assert rows["pixel_values"].shape == (12, 3, 4, 6)
    assert rows["pixel_values"].dtype == np.float32
    cases = build_cases(rows, RowLimits(3, 1, 512))
    assert cases[-1].name == "batch 7"
    for case in cases:
        assert set(case.inputs) == {"pixel_values", "task_ids"}
        assert case.inputs["pixel_values"].shape == (len(case.task_ids), 3, 4, 6)
    assert set(cases[-1].task_ids) == {0, 1, 2}
    assert {len(case.task_ids) for case in cases} >= {1, 2, 3, 7, 12}


def test_rows_are_padded_on_the_left_too() -> None:
    """The same tokens in the same order, ends flush, positions all different."""
    cases = {case.name: case for case in cases_of(3)}
    right, left = cases["mixed tasks"], cases["mixed tasks, padded left"]
    assert left.inputs["attention_mask"][:, -1].all()
    assert not left.inputs["attention_mask"][:, 0].all()
    for name in NAMES[:1] + NAMES[2:]:
        for row in range(len(right.task_ids)):
            before, after = (one.inputs["attention_mask"][row] == 1 for one in (right, left))
            assert (right.inputs[name][row][before] == left.inputs[name][row][after]).all()
    np.testing.assert_array_equal(right.task_ids, left.task_ids)


def test_the_full_preset_has_more_sizes_and_seeds() -> None:
    """One token, both sides of powers of two, more rows; only what the model can take."""
    rows = seeded_rows(RowLimits(3, 31), NAMES)
    found = more_cases(rows, RowLimits(3, 31, 100))
    assert [case.name for case in found] == [
        "batch 9 x 1", "batch 33 x 2", "batch 16 x 31", "batch 17 x 32", "batch 65 x 33",
        "batch 11 x 22, seed 2", "batch 11 x 23, seed 3", "batch 11 x 24, seed 4",
    ]  # fmt: skip
    assert {case.preset for case in found} == {"full"}
    assert {tuple(set(case.task_ids.tolist())) for case in found} == {(0, 1, 2)}
    for case in found:
        assert case.inputs["attention_mask"].any(axis=1).all()


def test_each_preset_holds_the_one_before_and_says_what_it_leaves_out() -> None:
    """Nothing disappears: what is not taken has a reason."""
    rows = seeded_rows(RowLimits(2, 31), NAMES)
    cases = cases_of(2) + more_cases(rows, RowLimits(2, 31, 100))
    names: dict[Preset, set[str]] = {}
    for preset in PRESETS:
        taken, left_out = choose(cases, preset)
        names[preset] = {case.name for case in taken}
        assert all(left_out.values())
        assert not names[preset] & set(left_out)
    assert names["quick"] == {"task 0", "task 1", "mixed tasks"}
    assert names["quick"] < names["standard"] < names["full"]
    assert choose(cases, "full")[1] == {}
    left_out = choose(cases, "quick")[1]
    assert left_out["every layer counts"] == "left out by --quick"
    assert left_out["8 more batches"] == "left out without --full"
    assert names["standard"] - names["quick"] <= set(left_out)
    assert choose(cases, "standard")[1] == {"8 more batches": "left out without --full"}
