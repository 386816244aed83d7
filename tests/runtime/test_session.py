"""``TaskSession``: what a service gets, held against the graph run by hand."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_export.errors import (
    BackendMissingError,
    EngineRunError,
    TaskNotFoundError,
    UsageError,
)
from mtl_export.runtime import TaskSession
from mtl_export.runtime import session as session_module
from mtl_export.runtime.ort import OrtRunner
from tests.factories import TASKS

NAMES = [task.name for task in TASKS]
WIDTHS = [len(task.labels) for task in TASKS]
# Of unequal lengths, padding id 0 not among them.
ROWS = [[2, 7, 9, 3], [2, 30, 3], [2, 5, 6, 8, 41, 12, 3], [2, 11, 3, 50, 3], [2, 21, 22, 3]]


@pytest.fixture(scope="module")
def session(exported: Path) -> TaskSession:
    """Return the single graph's session."""
    return TaskSession(exported / "out" / "onnx", threads=1)


def by_hand(graph: Path, row: list[int], task: int | None) -> np.ndarray:
    """Return one row's logits, alone in its batch and without padding."""
    ids = np.array([row])
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    inputs |= {} if task is None else {"task_ids": np.array([task])}
    with OrtRunner(graph, threads=1) as runner:
        return np.asarray(runner.infer(inputs)["logits"][0])


def test_the_docstring_is_true(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the class runs and prints what it says."""
    monkeypatch.chdir(exported)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    for example in finder.find(session_module.TaskSession, "TaskSession"):
        runner.run(example)
    assert runner.summarize() == doctest.TestResults(0, 6)


def test_a_service_needs_numpy_and_onnxruntime_only(exported: Path) -> None:
    """Serving imports neither torch, transformers, onnx nor this package's tensor formats."""
    program = (
        "import sys\n"
        "from mtl_export.runtime import TaskSession\n"
        "TaskSession(sys.argv[1]).run({'input_ids': [[2, 3]]}, 'spam')\n"
        "print({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'onnx',"
        " 'onnx_ir', 'ml_dtypes', 'safetensors', 'tokenizers'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported / "out" / "onnx")],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "set()\n"


def test_every_row_gets_its_own_tasks_answer(session: TaskSession, exported: Path) -> None:
    """Mixed tasks and lengths: each row as if it were alone, cut to its task's labels."""
    tasks = [0, 1, 2, 1, 0]
    results = session.run({"input_ids": ROWS}, tasks)
    assert results.outputs["logits"].shape == (5, max(WIDTHS))
    for row, task, answer in zip(ROWS, tasks, results.answers, strict=True):
        expected = by_hand(exported / "out" / "onnx" / "model.onnx", row, task)[: WIDTHS[task]]
        assert answer.task == TASKS[task]
        assert answer.labels == TASKS[task].labels
        assert answer.logits is not None
        assert answer.probabilities is not None
        np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
        assert answer.probabilities.sum() == pytest.approx(1.0, abs=1e-6)
        assert answer.decision == TASKS[task].labels[int(expected.argmax())]


def test_names_ids_and_one_for_all_say_the_same(session: TaskSession) -> None:
    """A task may be named, numbered (by numpy too) or said once."""
    by_name = session.run({"input_ids": ROWS}, ["topic"] * 5).outputs["logits"]
    same_tasks: list[Any] = [
        [1] * 5, np.array([1] * 5), "topic", 1, np.int64(1), np.array(1), np.array("topic"),
        torch.tensor(1), torch.tensor([1] * 5),
    ]  # fmt: skip
    for tasks in same_tasks:
        same = session.run({"input_ids": ROWS}, tasks).outputs["logits"]
        np.testing.assert_array_equal(by_name, same)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_split_batch_keeps_its_order(session: TaskSession, size: int) -> None:
    """max_batch changes what is run together, not what comes back."""
    whole = session.run({"input_ids": ROWS}, [2, 1, 0, 1, 2])
    split = session.run({"input_ids": ROWS}, [2, 1, 0, 1, 2], max_batch=size)
    np.testing.assert_allclose(split.outputs["logits"], whole.outputs["logits"], atol=1e-5)
    assert [a.decision for a in split.answers] == [a.decision for a in whole.answers]


def test_masks_and_types_given_are_used(session: TaskSession, exported: Path) -> None:
    """An array with its own mask is taken as it is; left out, the mask is ones."""
    ids = np.array([[2, 7, 9, 3, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    masked = session.run({"input_ids": ids, "attention_mask": mask}, 0).answers[0]
    alone = by_hand(exported / "out" / "onnx" / "model.onnx", ROWS[0], 0)[:2]
    assert masked.logits is not None
    np.testing.assert_allclose(masked.logits, alone, atol=1e-5)
    unmasked = session.run({"input_ids": ids}, 0).answers[0]
    assert np.abs(np.asarray(unmasked.logits) - alone).max() > 1e-3
    types = session.run({"input_ids": ROWS[:1], "token_type_ids": [[0, 0, 1, 1]]}, 0).answers[0]
    assert np.abs(np.asarray(types.logits) - alone).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_graph_serves_its_task(exported: Path, name: str) -> None:
    """Without asking, by its name and by its id; no other."""
    folder = exported / "out" / "onnx" / name
    merged = TaskSession(folder / "model.onnx", threads=1)
    assert merged.layout == "per-task"
    task = merged.tasks[0]
    first = merged.run({"input_ids": ROWS}).answers
    for tasks in (name, task.index, [name] * 5):
        again = merged.run({"input_ids": ROWS}, tasks).answers
        assert [a.decision for a in again] == [a.decision for a in first]
    expected = by_hand(folder / "model.onnx", ROWS[2], None)
    np.testing.assert_allclose(np.asarray(first[2].logits), expected, atol=1e-5)
    with pytest.raises(TaskNotFoundError, match=rf"one of {name} \({task.index}\)"):
        merged.run({"input_ids": ROWS}, next(other for other in NAMES if other != name))


@pytest.mark.parametrize("wrong", ["sapm", 3, -1, 2**32 + 1, True, "1", 1.0, np.bool_(True)])
def test_an_unknown_task_is_refused_with_those_there_are(session: TaskSession, wrong: Any) -> None:
    """No id outside the table reaches the graph, alone or among good ones."""
    for tasks in (wrong, ["spam", wrong, "spam", "spam", "spam"]):
        with pytest.raises(TaskNotFoundError) as caught:
            session.run({"input_ids": ROWS}, tasks)
        assert str(wrong) in caught.value.problem
        assert "ads_rel (0), topic (1), spam (2)" in caught.value.expected


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_a_batch_of_no_rows_is_refused(session: TaskSession, size: Any) -> None:
    """What is no number of rows is said to be none, and is not taken for "all"."""
    with pytest.raises(UsageError, match=r"max_batch: .* Expected a whole number, 1 or more"):
        session.run({"input_ids": ROWS}, "spam", max_batch=size)


@pytest.mark.parametrize("tasks", [None, [], ["spam"], ["spam"] * 6])
def test_as_many_tasks_as_rows(session: TaskSession, tasks: list[str] | None) -> None:
    """None of several tasks, too few and too many are refused."""
    with pytest.raises(UsageError, match="for 5 rows"):
        session.run({"input_ids": ROWS}, tasks)


WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "unknown input": ({"input_ids": ROWS, "pixels": ROWS}, "pixels is no input"),
    "missing input": ({"attention_mask": ROWS}, "input_ids is missing"),
    "no rows": ({"input_ids": []}, "no rows"),
    "an empty row": ({"input_ids": [*ROWS[:4], []]}, "onnx: row 4 of input_ids has no tokens$"),
    "fractions": ({"input_ids": [[1.5, 2.0]]}, "is float64"),
    "text": ({"input_ids": ["who", "what"]}, r"row 0 of input_ids is str96 \[\]"),
    "nothing": ({"input_ids": ROWS, "attention_mask": None}, "attention_mask is NoneType"),
    "a number": ({"input_ids": 5}, "onnx: input_ids is int, not rows$"),
    "no order": ({"input_ids": {(2, 3), (2, 4)}}, "input_ids is set"),
    "ragged rows": ({"input_ids": [[2, [3, 4]]]}, "row 0 of input_ids is no array"),
    "too large": ({"input_ids": [[2**70]]}, "row 0 of input_ids is no array"),
    "no batch": ({"input_ids": [2, 3]}, r"row 0 of input_ids is int64 \[\]"),
    "unequal counts": ({"input_ids": ROWS, "attention_mask": [[1]]}, "attention_mask has 1 rows"),
    "unequal lengths": (
        {"input_ids": [[2, 3]], "attention_mask": [[1, 1, 1]]},
        "row 0 has sequence 2 in input_ids, 3 in attention_mask",
    ),
    "below 0": ({"input_ids": [[2, 3], [2, -100, 3]]}, "onnx: row 1 of input_ids holds -100, "),
    "types below 0": (
        {"input_ids": [[2, 3]], "token_type_ids": [[0, -1]]},
        "row 0 of token_type_ids holds -1, ",
    ),
    "too long": ({"input_ids": [[2] * 40, [2] * 41]}, "row 1 has 41 tokens, .* at most 40"),
    "padded too long": (
        {"input_ids": [[2] * 38 + [0] * 5]},
        "row 0 has 38 tokens and 5 of padding, .* at most 40",
    ),
    "by no name": ([[2, 3]], "list in place of inputs by name"),
}


@pytest.mark.parametrize("fault", WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused(session: TaskSession, fault: str) -> None:
    """Nothing is cast, cut or filled in without a word."""
    inputs, message = WRONG_INPUTS[fault]
    with pytest.raises(UsageError) as caught:
        session.run(inputs, "spam")
    assert re.search(message, caught.value.problem)


def test_an_id_outside_the_vocabulary_is_refused(session: TaskSession) -> None:
    """By ONNX Runtime: the folder does not say how many there are."""
    with pytest.raises(EngineRunError, match="cannot run it"):
        session.run({"input_ids": [[2, 5000]]}, "spam")


@pytest.mark.parametrize("tasks", [{"spam", "topic"}, b"\x00\x01", {"spam": 0, "topic": 1}])
def test_tasks_have_the_order_of_rows(session: TaskSession, tasks: Any) -> None:
    """A set has none, bytes are no ids, and neither is taken for tasks."""
    with pytest.raises(UsageError, match=r"tasks: (set|bytes|dict) for 2 rows"):
        session.run({"input_ids": ROWS[:2]}, tasks)


def test_a_row_that_is_all_padding_has_an_answer(session: TaskSession) -> None:
    """Finite, and no other row's changes."""
    mask = [[1] * len(row) for row in ROWS[:4]] + [[0] * len(ROWS[4])]
    results = session.run({"input_ids": ROWS, "attention_mask": mask}, "spam")
    whole = session.run({"input_ids": ROWS}, "spam")
    logits = [np.asarray(answer.logits) for answer in results.answers]
    assert np.isfinite(logits[4]).all()
    for own, other in zip(logits[:4], whole.answers, strict=False):
        np.testing.assert_allclose(own, np.asarray(other.logits), atol=1e-5)


def test_nan_is_refused_with_its_row(session: TaskSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not answered with the first label."""
    logits = np.zeros((2, max(WIDTHS)), np.float32)
    logits[1, 0] = np.nan
    monkeypatch.setattr(session_module, "run_session", lambda *_: {"logits": logits})
    with pytest.raises(EngineRunError, match="row 1 of task 'spam': its logits are NaN"):
        session.run({"input_ids": ROWS[:2]}, ["topic", "spam"])


def test_a_single_text_is_refused(session: TaskSession) -> None:
    """It would be a row for each of its letters."""
    with pytest.raises(UsageError, match=r"one text, 'hello'.*Pass \[text\]"):
        session.encode("hello")


@pytest.mark.parametrize("entry", [None, 1, b"x", ("a", "b", "c"), ("a",), ("a", None)])
def test_what_is_neither_text_nor_pair_is_refused(session: TaskSession, entry: Any) -> None:
    """With the row and what stands there."""
    with pytest.raises(UsageError) as caught:
        session.encode(["fine", entry])
    assert caught.value.problem == f"texts: row 1 is {entry!r}"
    assert session.encode([["night", "shift"]]) == session.encode([("night", "shift")])  # type: ignore[list-item]


@pytest.mark.parametrize("texts", [None, 1, b"x", {"x"}])
def test_what_holds_no_rows_of_text_is_refused(session: TaskSession, texts: Any) -> None:
    """Sets as well: they have no order."""
    with pytest.raises(UsageError, match=f"texts: {type(texts).__name__}"):
        session.encode(texts)


def test_many_threads_share_one_session(session: TaskSession) -> None:
    """Forty calls on eight threads give what one thread gives."""

    def call(number: int) -> np.ndarray:
        row = ROWS[number % 5]
        return np.asarray(session.run({"input_ids": [row]}, NAMES[number % 3]).answers[0].logits)

    alone = [call(number) for number in range(15)]
    with ThreadPoolExecutor(8) as pool:
        for number, logits in enumerate(pool.map(call, range(40))):
            np.testing.assert_array_equal(logits, alone[number % 15])


def test_texts_become_the_tokens_of_the_base(session: TaskSession, exported: Path) -> None:
    """As AutoTokenizer gives them, pairs included; cut at the length limit only where asked to."""
    from transformers import AutoTokenizer

    texts = ["Free money ?", "who " * 60]
    tokenizer = AutoTokenizer.from_pretrained(exported / "base")
    expected = tokenizer(texts, truncation=True)
    cut = session.encode(texts, truncate=True)
    assert cut == {name: expected[name] for name in cut}
    assert len(cut["input_ids"][1]) == 40
    assert session.encode(texts[:1])["input_ids"] == cut["input_ids"][:1]
    with pytest.raises(UsageError, match=r"row 1 has 62 tokens\. Expected at most 40,.* truncate"):
        session.encode(texts)
    pair = tokenizer([["night shift", "nurse"]])
    assert session.encode([("night shift", "nurse")]) == {name: pair[name] for name in pair}


def test_generating_needs_a_language_model(session: TaskSession) -> None:
    """A classifier says what it would take."""
    with pytest.raises(UsageError, match="it does not generate"):
        session.generate(ROWS, "spam", max_new_tokens=3)


def test_a_folder_without_a_graph_names_those_inside(exported: Path, tmp_path: Path) -> None:
    """Whoever points one folder too high is told where the graphs are."""
    shutil.copytree(exported / "out" / "onnx" / "spam", tmp_path / "onnx" / "spam")
    with pytest.raises(UsageError, match=r"One of these is: .*spam"):
        TaskSession(tmp_path / "onnx")
    with pytest.raises(UsageError, match="Run mtl-export onnx"):
        TaskSession(tmp_path / "nothing")


def test_a_graph_that_names_no_tasks_is_refused(exported: Path, tmp_path: Path) -> None:
    """Any other ONNX file is not guessed at."""
    import onnx

    model = onnx.load(exported / "out" / "onnx" / "spam" / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="names no tasks"):
        TaskSession(tmp_path)


def test_a_provider_that_is_not_there_says_what_to_install(exported: Path) -> None:
    """CUDA on a CPU build is refused, never replaced by the CPU without a word."""
    with pytest.raises(BackendMissingError) as caught:
        TaskSession(exported / "out" / "onnx", providers=["cuda"])
    assert "CUDAExecutionProvider" in caught.value.problem
    assert "mtl-export[gpu]" in caught.value.fix
    with pytest.raises(BackendMissingError, match="NoSuchProvider"):
        TaskSession(exported / "out" / "onnx", providers=["NoSuchProvider"])


def test_padding_is_what_the_folder_says(exported: Path, tmp_path: Path) -> None:
    """config.json first, then the tokenizer, then 0; rows end where a table of positions does."""
    from mtl_export.runtime.texts import TextFiles

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / "base" / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 7, "n_positions": 9}))
    assert TextFiles(tmp_path).pad_token_id == 7
    assert TextFiles(tmp_path).positions == 9
    assert TextFiles(tmp_path).most_tokens is None
    table = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert TextFiles(tmp_path).most_tokens == 512
    rotated = {"model_type": "modernbert", "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(rotated))
    assert (TextFiles(tmp_path).positions, TextFiles(tmp_path).most_tokens) == (512, None)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"pad_token_id": 5}}))
    assert TextFiles(tmp_path).pad_token_id == 5
    (tmp_path / "config.json").write_text("{}")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["pad_token"] = "[MASK]"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert TextFiles(tmp_path).pad_token_id == 4
    assert TextFiles(tmp_path / "none").pad_token_id == 0
    assert TextFiles(tmp_path / "none").longest is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineRunError, match="not JSON"):
        TextFiles(tmp_path).positions  # noqa: B018
