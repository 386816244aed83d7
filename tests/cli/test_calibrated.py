from __future__ import annotations

import pytest

from mtl_export_calibration.evaluate import TaskScore
from mtl_export_calibration.formats import format_named
from mtl_export_calibration.measure import Options
from mtl_export_calibration.ranges import Cut
from mtl_export_calibration.report import GraphRanges, GraphReport, Outcome
from mtl_export_cli.calibrated import print_outcomes


def printed(
    capsys: pytest.CaptureFixture[str], number: str, *, drop: float, cut: Cut, trials: int
) -> str:
    """Return what is printed of a graph of two layers that was not written."""
    sqnr_db = {"q": {"spam": 20.0}, "k": {"spam": 18.0}}
    report = GraphReport(
        graph="single graph", number=number, method="max", engine="onnxruntime",
        combine="union", measured=GraphRanges({}, {}, sqnr_db, {"spam": cut}, {}),
        scores=(TaskScore("spam", 90, 90, 0.9, 0.88, 0.97, drop, 20.0),),
        excluded=(), apart=(), notes=(), max_drop=1.0, trials=trials, data={},
    )  # fmt: skip
    options = Options(format_named(number), "max")
    print_outcomes([Outcome(report, None)], options)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "formats"), [("int4", "--quantize int8 or fp8, "), ("int8", "--quantize fp8, ")]
)
def test_a_search_that_found_nothing_says_so_and_what_to_try(
    number: str, formats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many sets were tried, also where the best left no layer out."""
    found = printed(capsys, number, drop=2.0, cut=Cut(), trials=3)
    assert "0 of 2 layers left unquantised after 3 trials\n" in found
    assert f"try {formats}--max-excluded" in found


def test_values_beyond_the_ranges_want_other_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither more layers in float nor another format would help."""
    found = printed(capsys, "int8", drop=0.0, cut=Cut("x", 0.5, 0.001, 1e6), trials=1)
    assert "give --data rows like those of --judge" in found
    assert "FAILED" in found
    assert "trials" not in found
    assert "--quantize" not in found
