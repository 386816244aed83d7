from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import xmlschema

from mtl_export.parity.reports.junit import junit_text
from tests.parity.reports.samples import REPORTS, broken_off, failing, located, passing, scored


@pytest.fixture(scope="module")
def schema() -> xmlschema.XMLSchema:
    """Return what both JUnit schemas in use take."""
    return xmlschema.XMLSchema(str(Path(__file__).with_name("junit.xsd")))


def suites(text: str) -> dict[str, Element]:
    """Return the suites by name."""
    root = ElementTree.fromstring(text.encode())
    return {suite.get("name", ""): suite for suite in root}


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_satisfies_the_schema(kind: str, schema: xmlschema.XMLSchema) -> None:
    """Order, attributes and characters are what Jenkins and Ant take."""
    schema.validate(junit_text(REPORTS[kind]()))


def test_the_schema_refuses_what_they_refuse(schema: xmlschema.XMLSchema) -> None:
    """The check can fail: a missing attribute, an unknown one, a wrong order."""
    text = junit_text(failing())
    for old, new in (
        (' hostname="localhost"', ""),
        ('time="0" tests', 'time="0" took="1" tests'),
        ("</properties>", "</properties><system-out/>"),
        ('type="ParityFailed"', ""),
    ):
        assert old in text
        assert not schema.is_valid(text.replace(old, new))


def test_one_case_per_cell() -> None:
    """Each cell is a case of its artefact's suite, with its verdict and reason."""
    report = failing()
    found = suites(junit_text(report))
    assert list(found) == ["single graph", "merged", "engine"]
    kinds = {"passed": None, "failed": "failure", "not-run": "skipped"}
    for name, suite in found.items():
        own = [cell for cell in report.cells if cell.artefact == name]
        cases = suite.findall("testcase")
        assert len(cases) == len(own) == int(suite.get("tests", ""))
        assert suite.get("failures") == str(sum(c.verdict == "failed" for c in own))
        assert suite.get("skipped") == str(sum(c.verdict == "not-run" for c in own))
        assert suite.get("errors") == "0"
        for case, cell in zip(cases, own, strict=True):
            child = next(iter(case), None)
            assert (child.tag if child is not None else None) == kinds[cell.verdict]
            if child is not None and "\n" not in cell.reason:
                assert child.get("message") == cell.reason


def test_one_case_per_score() -> None:
    """Scores stand beside the cells of their artefact; a drop tells its numbers."""
    found = suites(junit_text(scored()))
    graph = found["single graph"]
    names = [case.get("name") for case in graph.findall("testcase")][-3:]
    assert names[0] == "ads_rel: accuracy of 400 rows"
    assert (graph.get("failures"), graph.get("skipped")) == ("1", "1")
    failure = graph.find("testcase/failure[@type='AccuracyFailed']")
    assert failure is not None
    assert "change: -8.77\n95 % interval: -11.00 to -6.00\nallowed: -1.00" in (failure.text or "")
    assert found["merged"].get("failures") == "1"


def test_no_two_cases_share_a_name() -> None:
    """GitLab would show two cases of one name as one."""
    for suite in suites(junit_text(failing())).values():
        names = [case.get("name") for case in suite.findall("testcase")]
        assert len(set(names)) == len(names)


def test_a_failure_tells_the_exact_numbers() -> None:
    """Error, limit, floor and decisions are in the text."""
    assert "largest error: 0.0007123456789\nallowed there: 1e-05\n" in junit_text(failing())


def test_a_failure_tells_where_its_error_begins() -> None:
    """The layer and the cause, in the text of the failure."""
    text = junit_text(located())
    assert "where: bert.encoder.layer.0.query is wrong: Lambda is &lt;transposed&gt;" in text
    assert "where:" not in junit_text(failing())


def test_our_own_error_is_an_error_and_no_failure() -> None:
    """A comparison that could not be made is one case with ``error``."""
    (suite,) = suites(junit_text(broken_off())).values()
    assert (suite.get("tests"), suite.get("errors"), suite.get("failures")) == ("1", "1", "0")
    error = suite.find("testcase/error")
    assert error is not None
    assert error.get("type") == "CheckpointError"
    assert "adapter & co: it is <broken>." in (error.text or "")


def test_time_comes_from_outside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timestamp that Ant demands is SOURCE_DATE_EPOCH, else 1970."""
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert 'timestamp="1970-01-01T00:00:00"' in junit_text(passing())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert 'timestamp="2023-11-14T22:13:20"' in junit_text(passing())
