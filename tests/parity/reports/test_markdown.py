from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import pytest
from markdown_it import MarkdownIt

from mtl_export.parity.reports.markdown import MOST_FAILURES, markdown_text
from tests.parity.reports.samples import (
    NASTY,
    REPORTS,
    TASKS,
    broken_off,
    cell,
    failing,
    located,
    nothing_ran,
    passing,
    score_passed,
    score_undecided,
    scored,
)


def shown(text: str) -> str:
    """Return what a reader sees: rendered, without tags, spaces made one."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_first_line_is_the_verdict() -> None:
    """Verdict and the three counts."""
    assert markdown_text(failing()).splitlines()[0] == (
        "### ❌ parity failed: 11 passed, 5 failed, 2 not-run"
    )
    assert markdown_text(passing()).startswith("### ✅ parity passed: 11 passed, 0 failed, 2")
    assert markdown_text(nothing_ran()).startswith("### ⚪ parity not-run: 0 passed")
    assert markdown_text(broken_off()).startswith("### ❌ parity could not be judged: adapter")


def test_scores_are_told() -> None:
    """The worst task is in the title, what did not pass is listed, all are folded away."""
    assert (
        markdown_text(scored())
        .splitlines()[0]
        .startswith("### ❌ parity passed: 11 passed, 0 failed, 2 not-run; accuracy failed")
    )
    title = markdown_text(score_undecided()).splitlines()[0]
    assert title.startswith("### ⚪")
    assert title.endswith("accuracy not-run: spam -5.00 points at worst")
    text = shown(markdown_text(scored()))
    for one in scored().accuracy:
        assert one.reason in text
    assert "0.9877 0.9000 -8.77 -11.00 to -6.00 -1.00 ❌ failed" in text
    assert "Scores that did not pass" not in markdown_text(score_passed())


def test_failures_and_what_did_not_run_are_listed() -> None:
    """Each with its reason; the matrix is folded away."""
    text = shown(markdown_text(failing()))
    for one in failing().cells:
        if one.verdict != "passed" and one.reason != NASTY:
            assert one.reason in text
    assert "7.1e-04 1.0e-05" in text
    assert "Not run, and so neither passed nor failed: engine, spam: no GPU" in text
    assert markdown_text(failing()).count("<details>") == 2


@pytest.mark.parametrize("kind", REPORTS)
def test_no_name_or_reason_is_taken_for_markup(kind: str) -> None:
    """A task may be called anything: no tag, mention, or extra column comes of it."""
    text = markdown_text(REPORTS[kind]())
    assert "<img" not in text
    assert "<b>" not in text
    assert "@" not in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        columns = {line.count("|") for line in table.splitlines()}
        assert len(columns) == 1
    if kind == "failing":
        assert TASKS[1] in shown(text)


def test_where_errors_begin_is_listed() -> None:
    """A line for each artefact and task; nothing without."""
    text = markdown_text(located())
    assert "Where the errors begin:" in text
    assert "is wrong: Lambda is &#60;transposed&#62;" in text
    assert "- merged, topic &#60;b&#62;" in text
    assert "Where the errors begin" not in markdown_text(failing())


def test_a_long_report_still_fits_a_comment() -> None:
    """GitHub takes 65,536 characters; what is left out is counted."""
    many = tuple(
        cell("single graph", f"task_{i}", "mixed tasks", 1e-3 + i, reason="x" * 900)
        for i in range(500)
    )
    text = markdown_text(replace(failing(), cells=many, noise_floors={}))
    assert len(text) < 65_536
    assert f"{MOST_FAILURES} of 500 failures shown" in text
    assert "100 of 500 tasks shown" in text
