from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mtl_export.parity.report import ParityReport
from mtl_export.parity.reports.html import html_text
from mtl_export.parity.reports.json_report import json_text
from tests.parity.reports.samples import (
    LIMIT,
    REPORTS,
    TASKS,
    broken_off,
    failing,
    located,
    passing,
    scored,
)

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects what the tests look at, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.script = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag and its attributes."""
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the attributes of what closes itself."""
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost tag, which must be this one."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note the text."""
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """Return what is read on the page."""
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        """Return every value of an attribute."""
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.mark.parametrize("kind", REPORTS)
def test_the_page_is_well_formed_and_alone(kind: str) -> None:
    """Every tag is closed, nothing is loaded or run, and every plot is XML."""
    text = html_text(REPORTS[kind]())
    page = Page(text)
    for name in ("src", "href", "xlink:href", "action", "srcset", "data", "style"):
        assert page.values(name) == []
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="report">']
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("kind", REPORTS)
def test_the_page_holds_the_json_report(kind: str) -> None:
    """The embedded document is the JSON report, to the last digit."""
    report = REPORTS[kind]()
    assert json.loads(Page(html_text(report)).script) == json.loads(json_text(report))


def cells_shown(report: ParityReport) -> list[list[float]]:
    """Return the exact numbers in each row of the table of all cells."""
    table = html_text(report).partition('id="cells"')[2].partition("</table>")[0]
    rows = table.split("<tr>")[2:]
    return [[float(value) for value in re.findall(r'data-value="([^"]*)"', row)] for row in rows]


def test_the_numbers_are_those_of_the_json() -> None:
    """Every cell's error, limit and floor; the counts; and what a hovering pointer reads."""
    report = failing()
    expected = [
        [
            number
            for number in (cell.max_abs_error, cell.limit, cell.noise_floor)
            if number is not None
        ]
        for cell in report.cells
    ]
    assert cells_shown(report) == expected
    page = Page(html_text(report))
    counts = re.findall(r'data-count="([^"]*)">(\d+)<', html_text(report))
    assert {word: int(count) for word, count in counts} == report.as_dict()["counts"]
    assert f"error 0.0007123456789, allowed {LIMIT!r}" in page.text


def test_texts_are_shown_and_not_obeyed() -> None:
    """A task name with markup is read as it is."""
    text = html_text(failing())
    assert TASKS[1] in Page(text).text
    assert "<img" not in text
    assert "<b>|" not in text


def test_what_failed_and_did_not_run_is_told() -> None:
    """Sections appear when there is something in them."""
    page = Page(html_text(failing())).text
    for words in (
        "Parity failed", "What failed", "Worst examples", "Error against noise floor",
        "How close to the limit", "Where the error is", "no GPU & no <driver>", "d" * 64,
    ):  # fmt: skip
        assert words in page
    assert "What failed" not in Page(html_text(passing())).text
    broken = Page(html_text(broken_off())).text
    assert "Parity not judged" in broken
    assert "adapter & co: it is <broken>." in broken


def test_scores_are_told() -> None:
    """A row for each, with the exact numbers and why it did not pass; none without rows."""
    text = html_text(scored())
    table = text.partition('id="accuracy"')[2].partition("</table>")[0]
    rows = table.split("<tr>")[2:]
    assert len(rows) == len(scored().accuracy)
    assert 'data-value="0.987654321"' in rows[1]
    page = Page(text).text
    assert "Parity failed" in page
    assert "drops by 0.0877 | <b>at least</b> 0.0600; allowed is 0.01" in page
    assert 'id="accuracy"' not in html_text(passing())


def test_where_errors_begin_is_drawn() -> None:
    """A square for each layer and task, exact numbers behind it, and what was found in words."""
    text = html_text(located())
    (drawn,) = [
        svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "by layer and task" in svg
    ]
    assert drawn.count("<rect") == len(located().localised[0].layers) == 4
    assert drawn.count('class="beyond"') == drawn.count('class="cross"') == 2
    assert drawn.count('class="carried"') == drawn.count('class="dash"') == 1
    page = Page(text).text
    for words in (
        "Where the errors begin", "is wrong: Lambda is <transposed>", "error 0.03, floor 2e-06",
        "its own not finite", "only outputs [3]", "not localised: it was not run & <not seen>",
        "must compute in float32", "not seen under their names: pooler",
    ):  # fmt: skip
        assert words in page
    assert "Where the errors begin" not in Page(html_text(failing())).text


def test_colour_never_speaks_alone() -> None:
    """Every square in red has a cross, in every heat map."""
    text = html_text(failing())
    maps = [svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "heat map of" in svg]
    assert len(maps) == 2
    reds = sum(svg.count('class="beyond"') for svg in maps)
    assert reds == sum(svg.count('class="cross"') for svg in maps) > 0


def test_extreme_numbers_are_drawn() -> None:
    """Zero, infinite and equal errors stay inside the drawing."""
    cells = tuple(
        replace(
            cell,
            max_abs_error=value,
            verdict="failed" if value else "passed",
            reason="" if not value else "x",
        )
        for cell in failing().cells[:3]
        for value in (0.0, 1e300, float("inf"))
    )
    text = html_text(replace(failing(), cells=cells))
    assert "nan" not in text.lower()
    for x in re.findall(r'cx="([^"]*)"', text):
        assert 0 <= float(x) <= 1000
