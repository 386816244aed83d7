from __future__ import annotations

import os
from numbers import Real
from pathlib import Path
from typing import Any

import pytest

from mtl_export.checkpoint.files.json_file import (
    json_or_none,
    misfit,
    parse_json,
    read_json,
    shown,
)
from mtl_export.checkpoint.files.small_file import MOST_BYTES, MOST_CONTAINERS
from mtl_export.errors import IntegrityError, UsageError
from tests.checkpoint.messages import assert_whole

MALFORMED = {
    "empty": (b"", "an empty file"),
    "blanks": (b" \n", "nothing but blanks"),
    "cut": (b'{"a": ', "not JSON"),
    "trailing": (b"{} {}", "not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not UTF-8 (byte 7)"),
    "utf-16": ("{}".encode("utf-16"), "not UTF-8"),
    "bom": (b"\xef\xbb\xbf{}", "BOM"),
    "deep lists": (b"[" * 200_000, "nested more than 100 deep"),
    "deep objects": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "nested more than 100 deep"),
    "deep and parsed": (b"[" * 101 + b"]" * 101, "nested more than 100 deep"),
    "many digits": (b'{"a": ' + b"9" * 5_000 + b"}", "thousands of digits"),
    "half a pair": (rb'{"a": "\ud800"}', "half of a surrogate pair"),
    "half a pair as key": (rb'{"\udfff": 1}', "half of a surrogate pair"),
    "bomb": (b"[" + b"[]," * MOST_CONTAINERS + b"[]]", "lists and objects"),
    "a list": (b"[]", "no JSON object, but []"),
    "null": (b"null", "no JSON object, but None"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_json_object_is_refused(tmp_path: Path, name: str) -> None:
    """Every failure is one error of the class asked for, from a file as from text."""
    content, found = MALFORMED[name]
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_json(path, error=IntegrityError)
    assert_whole(caught.value, where=str(path), found=found, expected="a JSON object")
    with pytest.raises(IntegrityError) as caught:
        parse_json(content, "metadata", error=IntegrityError)
    assert_whole(caught.value, where="metadata", found=found)
    assert json_or_none(path) is None


def test_size_is_looked_at_before_the_file_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte is refused at once, and so is a long text."""
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(IntegrityError) as caught:
        read_json(path, error=IntegrityError)
    assert_whole(caught.value, where="huge.json", found="1,099,511,627,776 bytes")
    with pytest.raises(IntegrityError, match="bytes, more than"):
        parse_json(b" " * (MOST_BYTES + 1), "text", error=IntegrityError)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe (which would wait for ever), nothing, and a path no system takes."""
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("", "no regular file"), ("pipe", "no regular file"), ("no", "no such")):
        with pytest.raises(IntegrityError, match=found):
            read_json(tmp_path / name, error=IntegrityError)
        assert json_or_none(tmp_path / name) is None
    with pytest.raises(UsageError, match=r"a\\x00b.*the system refused it"):
        read_json(tmp_path / "a\0b")
    with pytest.raises(UsageError, match="the system refused it"):
        read_json(tmp_path / ("a" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_another_user_is_said_to_be_one(tmp_path: Path) -> None:
    """It is the user's to allow, not the file's fault."""
    path = tmp_path / "closed.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(UsageError, match="chmod"):
        read_json(path)


def test_what_transformers_writes_is_read() -> None:
    """Infinity in a config, whole pairs, and the last of two equal keys."""
    text = r'{"limit": [0.0, Infinity], "face": "\ud83d\ude00", "a": 1, "a": 2}'
    assert parse_json(text, "") == {"limit": [0.0, float("inf")], "face": "\U0001f600", "a": 2}


@pytest.mark.parametrize(
    ("value", "shape", "problem"),
    [
        (True, int, "True"), (1.0, int, "1.0"), (2**63, int, "9223372036854775808"),
        (True, float, "True"), (float("inf"), float, "inf"), (float("nan"), float, "nan"),
        (10**400, float, "a whole number of 1329 bits"), (10**400, Real, "a whole number of"),
        ("1", Real, "'1'"), (0, bool, "0"), (None, str, "None"), ("c", {"a", "b"}, "'c'"),
        ([], {"a"}, "[]"), ({}, [str], "{}"), ([], {str: int}, "[]"), (1, (str, None), "1"),
        ("x" * 1000, int, "'xxx"), ({}, str, "{}"), ([1], (str, [str]), "0 is 1"),
        ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, "a.b.1 is 'x'"),
        ({"a": {}}, {"a": {"b": int}}, "no 'b' in a"), ({"a": 1}, {"a?": str}, "a is 1"),
    ],
)  # fmt: skip
def test_values_of_another_shape_are_named(value: Any, shape: Any, problem: str) -> None:
    """Where it is, what stands there in a few words, and what should."""
    found = misfit(value, shape, "" if isinstance(value, dict) and value else "key")
    assert found is not None
    assert problem in found[0]
    assert found[1]
    assert len(found[0]) < 120


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1, float), (-(2**63), int), (1.7e308, float), (float("nan"), Real), (2, Real),
        ([], [int]), ({}, {str: int}), ({"b": 0}, {"a?": int}), ({"a": None}, {"a?": int}),
        (None, (str, None)), ("a", {"a", "b"}), ([["x"]], object), ({"a": 1}, {}),
    ],
)  # fmt: skip
def test_values_of_the_shape_are_taken(value: Any, shape: Any) -> None:
    """Whole numbers are numbers; what may be absent may be null."""
    assert misfit(value, shape) is None


def test_a_value_of_any_size_is_shown_in_a_few_words() -> None:
    """Messages stay short, and numbers that Python does not print are described."""
    for value in (10**5000, "x" * 10**6, ["y" * 10**6] * 100, {str(i): i for i in range(10**4)}):
        assert len(shown(value)) < 400
