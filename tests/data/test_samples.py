from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.tensors import Array
from mtl_export.data.rows import Row
from mtl_export.data.samples import NO_LABEL, Samples, load_data, open_samples
from mtl_export.errors import CalibrationError
from tests.factories import TASKS, toy_tokenizer

OBJECTS: list[dict[str, Any]] = [
    {"task": "ads_rel", "text": "night nurse", "text_pair": "good film", "label": "yes"},
    {"task": "topic", "text": "what is a film ?", "label": 3},
    {"task": "spam", "text": "free money"},
    {"task": "spam", "text": "free free money", "label": "spam"},
]
ROWS = [Row(one["task"], one["text"], one.get("text_pair"), one.get("label")) for one in OBJECTS]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the toy tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer(folder)
    return folder


def opened(reference: object, folder: Path, per_task: int | None = None) -> tuple[Samples, Any]:
    """Open data with the toy's tasks."""
    return open_samples(str(reference), TASKS, folder, max_length=40, per_task=per_task, seed=0)


def write_rows(path: Path, objects: list[dict[str, Any]]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    return path


def arrays(rows: int = 6) -> dict[str, Array]:
    """Return arrays of tokens, the first row shorter."""
    mask = np.ones((rows, 5), np.int64)
    mask[0, 2:] = 0
    return {
        "input_ids": np.arange(rows * 5).reshape(rows, 5) % 50,
        "attention_mask": mask,
        "task_ids": np.arange(rows) % 3,
        "labels": np.arange(rows) % 2,
    }


def test_a_folder_has_a_file_for_each_task(tmp_path: Path) -> None:
    """The file's name is the task of rows that name none."""
    write_rows(tmp_path / "spam.jsonl", [{"text": "free"}, {"task": "topic", "text": "who"}])
    write_rows(tmp_path / "ads_rel.jsonl", [{"text": "nurse"}])
    assert load_data(str(tmp_path)) == [
        Row("ads_rel", "nurse"),
        Row("spam", "free"),
        Row("topic", "who"),
    ]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    """An empty folder is no data."""
    with pytest.raises(CalibrationError, match=r"no \*\.jsonl file"):
        load_data(str(tmp_path))


def test_a_function_gives_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file, or by the module's name in the current folder; its neighbours import."""
    (tmp_path / "h8_neighbour.py").write_text(f"OBJECTS = {OBJECTS!r}\n")
    code = "from h8_neighbour import OBJECTS\ndef rows():\n    yield from OBJECTS\n"
    (tmp_path / "h8_rows.py").write_text(code)
    assert load_data(f"{tmp_path / 'h8_rows.py'}:rows") == ROWS
    monkeypatch.chdir(tmp_path)
    assert load_data("h8_rows:rows") == ROWS


def test_a_function_gives_arrays(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A mapping is taken as an npz file would be."""
    code = "import numpy as np\ndef tokens():\n    return {'input_ids': np.ones((3, 4), np.int64),"
    (tmp_path / "made.py").write_text(f"{code} 'task_ids': [0, 1, 2]}}\n")
    samples, _ = opened(f"{tmp_path / 'made.py'}:tokens", tokenizer_folder)
    assert samples.arrays["input_ids"].shape == (3, 4)
    assert samples.labels.tolist() == [NO_LABEL] * 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise OSError('no network')", "raised OSError: no network"),
        ("return []", "no row"),
        ("return [{'text': 'x'}]", "row 0 has no text in 'task' and 'text'"),
        ("return 3", "no row"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path: Path, body: str, reason: str) -> None:
    """What the user's code did is in the message."""
    (tmp_path / "faulty.py").write_text(f"def rows():\n    {body}\n")
    with pytest.raises(CalibrationError, match=reason):
        load_data(f"{tmp_path / 'faulty.py'}:rows")


def test_an_npz_file_is_the_models_inputs(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Arrays by the inputs' names, task ids and labels."""
    np.savez(tmp_path / "rows.npz", **arrays())  # type: ignore[arg-type]
    samples, counts = opened(tmp_path / "rows.npz", tokenizer_folder)
    assert set(samples.arrays) == {"input_ids", "attention_mask"}
    assert samples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert {name: count.available for name, count in counts.items()} == dict.fromkeys(counts, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"task_ids": np.array([0, 1, 2, 3, 0, 1])},
            "task ids that the checkpoint does not have: 3",
        ),
        ({"task_ids": np.array([0, 1, 2])}, "one row a sample"),
        ({"input_idz": np.zeros((6, 3))}, "arrays that are no input: input_idz"),
        ({"task_ids": np.zeros(6, np.int64)}, "no row for topic, spam"),
        ({"labels": np.zeros((6, 2))}, r"labels float64 \(6, 2\)"),
    ],
)
def test_wrong_arrays_are_refused(
    tmp_path: Path, tokenizer_folder: Path, changes: dict[str, Array], reason: str
) -> None:
    """Unknown ids, other row counts, and a task without data."""
    np.savez(tmp_path / "rows.npz", **{**arrays(), **changes})  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=reason):
        opened(tmp_path / "rows.npz", tokenizer_folder)


def test_a_pickled_npz_is_refused(tmp_path: Path) -> None:
    """Data cannot run code."""
    np.savez(tmp_path / "rows.npz", x=np.array([{}], dtype=object))
    with pytest.raises(CalibrationError, match=r"no array of numbers \(dtype '\|O'\)"):
        load_data(str(tmp_path / "rows.npz"))


def test_an_npz_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    """Zip's own error is the file's, not a bug."""
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.arange(9))
    for content in (path.read_bytes()[:100], b""):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match="damaged"):
            load_data(str(path))


def test_labels_are_names_or_indices(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Rows without one are marked; all rows are taken in order."""
    samples, counts = opened(write_rows(tmp_path / "rows.jsonl", OBJECTS), tokenizer_folder)
    assert samples.task_ids.tolist() == [0, 1, 2, 2]
    assert samples.labels.tolist() == [1, 3, NO_LABEL, 2]
    assert (counts["spam"].available, counts["spam"].used, counts["spam"].fed) == (2, 2, 2)


def test_unknown_labels_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A label of another task would be counted as an error for ever."""
    rows = [*OBJECTS[:3], {"task": "spam", "text": "x", "label": True}]
    with pytest.raises(CalibrationError, match="True of task spam"):  # and not index 1
        opened(write_rows(tmp_path / "rows.jsonl", rows), tokenizer_folder)
    rows = [*OBJECTS[:3], {"task": "spam", "text": "x", "label": "yes"}]
    with pytest.raises(CalibrationError, match="'yes' of task spam"):
        opened(write_rows(tmp_path / "rows.jsonl", rows), tokenizer_folder)


def test_tasks_weigh_the_same_in_a_sample(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A task with one row is fed as often as one with two; the counts say so."""
    path = write_rows(tmp_path / "rows.jsonl", OBJECTS)
    samples, counts = opened(path, tokenizer_folder, per_task=2)
    assert samples.task_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert [(c.available, c.used, c.fed) for c in counts.values()] == [
        (1, 1, 2),
        (1, 1, 2),
        (2, 2, 2),
    ]


def test_batches_are_cut_to_their_longest_row() -> None:
    """Short rows come first and are not padded to the longest of all."""
    values = arrays()
    ids = values.pop("task_ids")
    labels = values.pop("labels")
    samples = Samples(values, ids, labels)
    shapes = [batch.arrays["input_ids"].shape for batch in samples.batches(1)]
    assert shapes == [(1, 2)] + [(1, 5)] * 5
    whole = np.concatenate([batch.task_ids for batch in samples.batches(4)])
    assert sorted(whole) == sorted(ids)


def test_the_hash_sees_every_value() -> None:
    """Other tokens, tasks or labels are other data."""
    values = arrays()
    ids, labels = values.pop("task_ids"), values.pop("labels")
    hashes = {
        Samples(values, ids, labels).sha256(),
        Samples(values, ids, labels + 1).sha256(),
        Samples(values, ids[::-1], labels).sha256(),
        Samples({**values, "input_ids": values["input_ids"] + 1}, ids, labels).sha256(),
    }
    assert len(hashes) == 4
    assert Samples(dict(reversed(values.items())), ids, labels).sha256() in hashes
