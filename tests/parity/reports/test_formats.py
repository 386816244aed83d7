from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.errors import UsageError
from mtl_export.parity.reports.formats import SUFFIXES, report_text, suffix_of
from tests.parity.reports.samples import REPORTS


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", REPORTS)
def test_one_report_gives_one_text(kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every report has every format; time and place of writing do not show."""
    path = Path(f"parity{suffix}")
    first = report_text(REPORTS[kind](), path)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.chdir("/")
    assert report_text(REPORTS[kind](), Path("/elsewhere") / path) == first
    assert first.endswith("\n")


def test_the_longest_suffix_decides() -> None:
    """SARIF's long suffix is not taken for JSON; case does not matter."""
    assert suffix_of(Path("a.sarif.json")) == ".sarif.json"
    assert report_text(REPORTS["passing"](), Path("a.SARIF.json")) == report_text(
        REPORTS["passing"](), Path("a.sarif")
    )
    assert suffix_of(Path("a.b.json")) == ".json"


@pytest.mark.parametrize("name", ["parity.txt", "parity", ".json.bak", "parity.sarif.xz"])
def test_a_suffix_without_a_format_is_refused(name: str) -> None:
    """The message lists what there is."""
    with pytest.raises(UsageError, match=r"\.json, \.xml, \.sarif, \.md, \.html"):
        suffix_of(Path(name))
