"""Labels of every kind of task, read from rows and from arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.checkpoint import Task
from mtl_export.errors import CalibrationError
from mtl_export.parity.accuracy.labelled_files import open_labelled
from mtl_export.parity.accuracy.labelled_rows import LabelledRows
from tests.factories import toy_tokenizer

TASKS = (
    Task("spam", 0, ("ham", "spam"), "single_label_classification"),
    Task("topics", 1, ("art", "film", "news"), "multi_label_classification"),
    Task("stars", 2, (), "regression"),
)
ROWS: list[dict[str, Any]] = [
    {"task": "stars", "text": "good film", "label": 4.5},
    {"task": "spam", "text": "free money", "label": "spam"},
    {"task": "topics", "text": "night", "label": ["film", 2]},
    {"task": "spam", "text": "nurse", "label": 0},
    {"task": "stars", "text": "bad", "label": 1},
    {"task": "topics", "text": "shift", "label": []},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer(folder)
    return folder


def opened(
    rows: list[dict[str, Any]], tokenizer: Path, folder: Path, **scores: str
) -> LabelledRows:
    """Return what a JSONL file with these rows gives."""
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return open_labelled(str(file), TASKS, tokenizer, max_length=16, scores=scores)


def test_each_kind_of_task_has_its_labels(tokenizer: Path, tmp_path: Path) -> None:
    """Names and indices, lists of them, numbers; each task by the score of its kind."""
    found = opened(ROWS, tokenizer, tmp_path)
    assert found.inputs["task_ids"].tolist() == [2, 0, 1, 0, 2, 1]
    assert len(found) == 6
    assert {name: truth.score for name, truth in found.truths.items()} == {
        "spam": "accuracy", "topics": "f1", "stars": "spearman",
    }  # fmt: skip
    assert found.truths["spam"].labels.tolist() == [1, 0]
    assert found.truths["topics"].labels.tolist() == [[False, True, True], [False, False, False]]
    assert found.truths["stars"].labels.tolist() == [4.5, 1.0]


def test_a_score_may_be_chosen_and_queries_ask_for_ndcg(tokenizer: Path, tmp_path: Path) -> None:
    """Rows of one query get one number; relevance is a number."""
    assert opened(ROWS, tokenizer, tmp_path, spam="auc").truths["spam"].score == "auc"
    ranked = [{"task": "spam", "text": "nurse", "label": n, "query": q} for n, q in ((3, "x"),
              (0, "y"), (1, "x"))]  # fmt: skip
    own = opened([*ranked, *ROWS[:1], *ROWS[2:3]], tokenizer, tmp_path).truths["spam"]
    assert own.score == "ndcg"
    assert own.queries is not None
    assert own.queries.tolist() == [0, 1, 0]
    assert own.labels.tolist() == [3.0, 0.0, 1.0]


def test_arrays_say_the_same_as_rows(tokenizer: Path, tmp_path: Path) -> None:
    """An npz file has one array of labels for all tasks."""
    rows = opened([row for row in ROWS if row["task"] != "topics"] + ROWS[2:3], tokenizer, tmp_path)
    arrays = {**rows.inputs, "labels": np.array([4.5, 1, 0, 1, 2])}
    np.savez(str(tmp_path / "rows.npz"), **arrays)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="of task topics"):
        open_labelled(str(tmp_path / "rows.npz"), TASKS, tokenizer, max_length=9, scores={})
    two = tuple(task for task in TASKS if task.name != "topics")
    two = (two[0], Task("stars", 1, (), "regression"))
    keep = rows.inputs["task_ids"] != 1
    arrays = {name: value[keep] for name, value in arrays.items()}
    arrays["task_ids"] = arrays["task_ids"] // 2
    np.savez(str(tmp_path / "rows.npz"), **arrays)  # type: ignore[arg-type]
    found = open_labelled(str(tmp_path / "rows.npz"), two, tokenizer, max_length=9, scores={})
    assert set(found.inputs) == set(rows.inputs)
    for name in ("spam", "stars"):
        assert found.truths[name].labels.tolist() == rows.truths[name].labels.tolist()
        assert found.truths[name].labels.dtype == rows.truths[name].labels.dtype


def test_several_labels_as_an_array(tokenizer: Path, tmp_path: Path) -> None:
    """Bool [N, L]."""
    task = Task("topics", 0, ("art", "film", "news"), "multi_label_classification")
    labels = np.array([[True, False, True], [False, False, True]])
    np.savez(
        tmp_path / "rows.npz", input_ids=np.ones((2, 3), np.int64),
        task_ids=np.zeros(2, np.int32), labels=labels,
    )  # fmt: skip
    found = open_labelled(str(tmp_path / "rows.npz"), [task], tokenizer, max_length=9, scores={})
    np.testing.assert_array_equal(found.truths["topics"].labels, labels)
    assert found.inputs["task_ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "spam", "text": "x", "label": "junk"}, "'junk' of task spam (row 7)"),
        ({"task": "spam", "text": "x", "label": 2}, "2 of task spam"),
        ({"task": "spam", "text": "x"}, "None of task spam"),
        ({"task": "spam", "text": "x", "label": 0.5}, "0.5 of task spam"),
        ({"task": "spam", "text": "x", "label": 1.0}, "1.0 of task spam"),
        ({"task": "spam", "text": "x", "label": True}, "True of task spam"),
        ({"task": "stars", "text": "x", "label": True}, "True of task stars"),
        ({"task": "topics", "text": "x", "label": [True]}, "of task topics"),
        ({"task": "topics", "text": "x", "label": "film"}, "'film' of task topics"),
        ({"task": "topics", "text": "x", "label": ["film", 0.5]}, "of task topics"),
        ({"task": "topics", "text": "x", "label": [["film"]]}, "of task topics"),
        ({"task": "stars", "text": "x", "label": "five"}, "'five' of task stars"),
    ],
)
def test_a_row_without_a_label_of_its_task_is_refused(
    tokenizer: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    """A row that is left out would not be counted; each is named."""
    with pytest.raises(CalibrationError) as caught:
        opened([*ROWS, change], tokenizer, tmp_path)
    assert reason in str(caught.value)


def test_every_task_needs_rows_and_labels(tokenizer: Path, tmp_path: Path) -> None:
    """A task without rows would never be the worst one; one without a head has no score."""
    with pytest.raises(CalibrationError, match="no row for topics"):
        opened([row for row in ROWS if row["task"] != "topics"], tokenizer, tmp_path)
    headless = [Task("chat", 0, (), "headless")]
    with pytest.raises(CalibrationError, match="chat, which has no labels"):
        open_labelled(str(tmp_path / "x.jsonl"), headless, tokenizer, max_length=9, scores={})
    np.savez(tmp_path / "bare.npz", task_ids=np.arange(3), input_ids=np.ones((3, 2), np.int64))
    with pytest.raises(CalibrationError, match="no labels"):
        open_labelled(str(tmp_path / "bare.npz"), TASKS, tokenizer, max_length=9, scores={})
