from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_export.checkpoint.files.tokenizer_file import MOST_ID
from mtl_export.errors import EngineRunError, UsageError
from mtl_export.runtime.rows import Field, rows_from
from mtl_export.runtime.texts import TextFiles
from tests.factories import toy_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer that a test may break."""
    toy_tokenizer(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of ``tokenizer.json``; those of its model where it has them."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    for name, value in changes.items():
        (document["model"] if name in document["model"] else document)[name] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "row", ["\ud800 x", ("a", "\udfff"), ("a", 1), ("a",), 3, None, b"a", ["a", ["b"]]]
)
def test_what_is_no_text_is_refused(folder: Path, row: Any) -> None:
    """Half of a surrogate pair too, which the library calls a wrong type."""
    with pytest.raises(UsageError, match="row 1 is"):
        TextFiles(folder).encode(["good", row])


@pytest.mark.parametrize(
    "tokens",
    [None, 5, "x", [5], ["x"], [None], [[10**10]], [[-1]], [["x"]], [[1.0]], [[True]], {1: [2]},
     [[2**32]], [{1}], np.array(3)],
    ids=repr,
)  # fmt: skip
def test_what_is_no_row_of_tokens_is_refused(folder: Path, tokens: Any) -> None:
    """Texts come from rows of ids, and nothing else reaches the library."""
    with pytest.raises(UsageError, match="tokens"):
        TextFiles(folder).decode(tokens)


def test_rows_of_numpy_are_decoded(folder: Path) -> None:
    """Arrays, lists of arrays, and ids that no token has."""
    files = TextFiles(folder)
    ids = files.encode(["good"])["input_ids"]
    given: list[Any] = [ids, np.array(ids), [np.array(ids[0], np.int32)]]
    for tokens in given:
        assert files.decode(tokens) == files.decode(ids)
    assert files.decode([[2**32 - 1], []]) == ["", ""]


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab": {"[UNK]": 2**31}},
        {"vocab": {"[UNK]": MOST_ID + 1}},
        {"added_tokens": [{"id": 2**31, "content": "a", "special": True}]},
    ],
)
def test_ids_that_would_fill_the_memory_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    """The library's table is as long as the largest id: 8.5 GB for a file of 2 KB."""
    edit(folder, **changes)
    with pytest.raises(EngineRunError, match="the id"):
        TextFiles(folder).encode(["good"])


def test_padding_and_truncation_of_the_file_are_not_used(folder: Path) -> None:
    """A fixed length of 2**40 costs nothing: the rows are those of a file without it."""
    expected = TextFiles(folder).encode(["good", ("a", "b")])
    padding = {
        "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 2**40,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    truncation = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 2**40,
    }  # fmt: skip
    edit(folder, padding=padding, truncation=truncation)
    assert TextFiles(folder).encode(["good", ("a", "b")]) == expected


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model": {}}', '{"model": {"type": "WordLevel"}}', "[" * 9_000]
)
def test_a_broken_tokenizer_is_refused(folder: Path, content: str) -> None:
    """What the library raises for one is a bare Exception."""
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(EngineRunError, match=r"tokenizer\.json"):
        TextFiles(folder).encode(["good"])


def test_a_panic_of_the_library_is_our_error(folder: Path) -> None:
    """It is no Exception, so that services would not catch it."""

    class PanicError(BaseException):
        """Stands for pyo3's."""

    class Panicking:
        def encode_batch(self, texts: list[str]) -> None:
            raise PanicError("capacity overflow\nat lib.rs")

    files = TextFiles(folder)
    files.__dict__["_tokenizer"] = Panicking()
    with pytest.raises(EngineRunError, match=r"cannot use it \(capacity overflow\)"):
        files.encode(["good"])


@pytest.mark.parametrize("mask", [[1, -1], [1, 2], [5, 1]])
def test_a_mask_is_zeros_and_ones(mask: list[int]) -> None:
    """Any other number would be counted, multiplied or compared, as the graph happens to."""
    fields = [
        Field(name, ("batch", "sequence"), "int64") for name in ("input_ids", "attention_mask")
    ]
    with pytest.raises(UsageError, match="a mask is 0 or 1"):
        rows_from(
            {"input_ids": [[3, 4]], "attention_mask": [mask]}, fields, pad_token_id=0, where="graph"
        )
