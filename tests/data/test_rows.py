from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtl_export.data.rows import Row, balanced, load_rows, tokenize
from mtl_export.errors import CalibrationError
from tests.factories import TASKS, toy_base, toy_tokenizer

ROWS = [
    Row("ads_rel", "night nurse", "good film"),
    Row("topic", "what is a film ?"),
    Row("spam", "free money"),
    Row("ads_rel", "a", "b"),
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the toy tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer(folder)
    return folder


def write(path: Path, *lines: str) -> Path:
    """Write lines to a file and return it."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_are_read_in_order(tmp_path: Path) -> None:
    """Pairs, single texts, labels and foreign keys are understood, empty lines skipped."""
    path = write(
        tmp_path / "rows.jsonl",
        json.dumps({"task": "ads_rel", "text": "nurse", "text_pair": "film", "label": 1, "x": []}),
        "",
        json.dumps({"task": "spam", "text": "bärgeld", "text_pair": None}),
    )
    assert load_rows(path) == [Row("ads_rel", "nurse", "film", 1), Row("spam", "bärgeld")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"text": "x"}', "line 2 has no text in 'task' and 'text'"),
        ('{"task": "spam", "text": 3}', "line 2 has no text in 'task' and 'text'"),
        ('{"task": "spam", "text": "x", "text_pair": 3}', "'text_pair' that is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    """The message has the line's number and what is wrong with it."""
    path = write(tmp_path / "rows.jsonl", '{"task": "spam", "text": "x"}', line)
    with pytest.raises(CalibrationError, match=reason):
        load_rows(path)


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """Separators that JSON allows inside a text do not cut it; a byte order mark is no text."""
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\u2029three\u0085four\x7f"
    line = json.dumps({"task": "spam", "text": text}, ensure_ascii=False)
    path.write_bytes(f"\ufeff{line}\r\n\n{line}\n".encode())
    assert [row.text for row in load_rows(path)] == [text, text]


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    """An empty file is not an empty success."""
    with pytest.raises(CalibrationError, match="no row"):
        load_rows(write(tmp_path / "rows.jsonl"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A wrong path is named."""
    with pytest.raises(CalibrationError, match=r"nowhere\.jsonl: it cannot be read"):
        load_rows(tmp_path / "nowhere.jsonl")


def test_tokens_have_the_ids_types_and_masks_of_the_tokenizer(tokenizer_folder: Path) -> None:
    """Pairs and single texts are mixed, padded to the longest, all int64."""
    arrays = tokenize(ROWS, tokenizer_folder, TASKS, max_length=40)
    assert {name: (value.dtype, value.shape) for name, value in arrays.items()} == {
        "input_ids": (np.dtype(np.int64), (4, 7)),
        "token_type_ids": (np.dtype(np.int64), (4, 7)),
        "attention_mask": (np.dtype(np.int64), (4, 7)),
        "task_ids": (np.dtype(np.int64), (4,)),
    }
    assert arrays["task_ids"].tolist() == [0, 1, 2, 0]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [7, 7, 4, 5]
    assert arrays["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (arrays["input_ids"][arrays["attention_mask"] == 0] == 0).all()


def test_long_rows_are_cut(tokenizer_folder: Path) -> None:
    """No row is longer than the model takes."""
    arrays = tokenize([Row("spam", "a " * 100)], tokenizer_folder, TASKS, max_length=9)
    assert arrays["input_ids"].shape == (1, 9)


def test_rows_of_unknown_tasks_are_refused(tokenizer_folder: Path) -> None:
    """A task that the checkpoint lacks is named, by both functions."""
    rows = [*ROWS, Row("sentiment", "x")]
    with pytest.raises(CalibrationError, match="does not have: sentiment"):
        tokenize(rows, tokenizer_folder, TASKS, max_length=40)
    with pytest.raises(CalibrationError, match="does not have: sentiment"):
        balanced(rows, TASKS, per_task=1, seed=0)


def test_no_rows_are_refused(tokenizer_folder: Path) -> None:
    """There is nothing to tokenize in nothing."""
    with pytest.raises(CalibrationError, match="input rows: none"):
        tokenize([], tokenizer_folder, TASKS, max_length=40)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """The message says which files are missing."""
    with pytest.raises(CalibrationError, match="no tokenizer that transformers can load"):
        tokenize(ROWS, tmp_path, TASKS, max_length=40)


MANY = [Row(task.name, str(number)) for task in TASKS for number in range(5 + 10 * task.index)]


def test_a_sample_is_balanced() -> None:
    """Every task has the same number of rows, in turns, each row at most once if it can."""
    sample = balanced(MANY, TASKS, per_task=5, seed=0)
    assert [row.task for row in sample] == [task.name for task in TASKS] * 5
    assert len(set(sample)) == 15


def test_a_small_task_is_repeated_evenly() -> None:
    """A task with 5 rows gives 12 by taking each row two or three times."""
    sample = balanced(MANY, TASKS, per_task=12, seed=0)
    counts = Counter(row for row in sample if row.task == "ads_rel")
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]
    assert len({row for row in sample if row.task == "spam"}) == 12


def test_a_sample_depends_on_the_seed_and_on_nothing_else() -> None:
    """The same seed gives the same rows, another seed others, another task changes none."""
    sample = balanced(MANY, TASKS, per_task=5, seed=0)
    assert balanced(MANY, TASKS, per_task=5, seed=0) == sample
    assert balanced(MANY, TASKS, per_task=5, seed=1) != sample
    fewer = balanced([row for row in MANY if row.task != "topic"], TASKS[::2], 5, seed=0)
    assert fewer == [row for row in sample if row.task != "topic"]


def test_a_task_without_rows_is_refused() -> None:
    """Calibrating without a task would clip it unseen."""
    rows = [row for row in MANY if row.task != "topic"]
    with pytest.raises(CalibrationError, match="no row for topic"):
        balanced(rows, TASKS, per_task=1, seed=0)


def test_at_least_one_row_per_task_is_asked_for() -> None:
    """Zero rows per task is no sample."""
    with pytest.raises(CalibrationError, match="0 rows per task"):
        balanced(MANY, TASKS, per_task=0, seed=0)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 2**31, "content": "[X]"}]}),
        ("tokenizer.json", {"model": {"type": "WordPiece"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"0": "x"}}),
        ("config.json", {"num_hidden_layers": "-"}),
    ],
)
def test_a_broken_tokenizer_is_refused(
    tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    """Whatever transformers makes of it, and an id that would take gigabytes before it does."""
    toy_base(tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CalibrationError, match="no tokenizer that transformers can load"):
        tokenize([Row("ads_rel", "free")], tmp_path / "base", TASKS, max_length=9)
