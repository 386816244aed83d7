from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from mtl_export.parity.accuracy.scores import SCORES
from mtl_export.parity.diagnosis.layer_errors import Bisection, Finding, LayerError, Localisation
from mtl_export.parity.report import SCHEMA, AccuracyCell, ArtefactFiles, Cell, RecordedTask
from mtl_export.parity.reports.json_report import json_text, read_schema
from tests.parity.reports.samples import REPORTS, failing, localised, scored, scores

VALIDATOR = Draft202012Validator(read_schema())


def test_the_schema_is_one() -> None:
    """It is valid itself and names the version that reports carry."""
    Draft202012Validator.check_schema(read_schema())
    assert read_schema()["properties"]["schema"] == {"const": SCHEMA}


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_satisfies_the_schema(kind: str) -> None:
    """What is written is what is published."""
    VALIDATOR.validate(json.loads(json_text(REPORTS[kind]())))


def test_the_schema_describes_every_key() -> None:
    """A field that is added to a record is added to the schema."""
    schema = read_schema()
    assert set(schema["properties"]) == set(failing().as_dict())
    for name, record in (
        ("cell", Cell), ("artefact", ArtefactFiles), ("recorded", RecordedTask),
    ):  # fmt: skip
        assert set(schema["$defs"][name]["properties"]) == {one.name for one in fields(record)}
    scored = {one.name for one in fields(AccuracyCell)} | {"drop"}
    assert set(schema["$defs"]["score"]["properties"]) == scored
    assert set(schema["$defs"]["score"]["properties"]["score"]["enum"]) == set(SCORES)
    for name, part in (
        ("localisation", Localisation), ("finding", Finding), ("layer", LayerError),
        ("bisection", Bisection),
    ):  # fmt: skip
        assert set(schema["$defs"][name]["properties"]) == {one.name for one in fields(part)}


def test_where_errors_begin_is_published() -> None:
    """Layers, findings and a bisection satisfy the schema, an error that is not finite too."""
    document = json.loads(json_text(replace(failing(), localised=localised())))
    VALIDATOR.validate(document)
    assert document["localised"][0]["layers"][1]["error"] is None


def set_in(path: str, value: object) -> dict[str, Any]:
    """Return a report with the value at ``path`` replaced."""
    document: dict[str, Any] = json.loads(json_text(replace(failing(), accuracy=scores())))
    at: Any = document
    *steps, last = path.split("/")
    for step in steps:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "mtl-export.parity/2"),
        ("verdict", "skipped"),
        ("counts/failed", -1),
        ("noise_floors/fp32/spam", "small"),
        ("cells/0/verdict", "ok"),
        ("cells/0/reason", "a pass needs none"),
        ("cells/9/reason", ""),
        ("cells/0/max_abs_error", -1e-9),
        ("cells/0/decisions", [4, 4]),
        ("artefacts/0/sha256", {"model.onnx": "short"}),
        ("accuracy/verdict", "unsure"),
        ("accuracy/cells/0/score", "bleu"),
        ("accuracy/cells/1/reason", ""),
        ("accuracy/cells/0/drop", "none"),
    ],
)
def test_the_schema_refuses_what_is_no_report(path: str, value: object) -> None:
    """A wrong word, a negative count, a failure without a reason."""
    with pytest.raises(ValidationError):
        VALIDATOR.validate(set_in(path, value))


def test_a_dropped_score_fails_the_whole_report() -> None:
    """The verdict at the top is on both gates; the scores' own stands beside them."""
    document = json.loads(json_text(scored()))
    assert (document["verdict"], document["accuracy"]["verdict"]) == ("failed", "failed")
    assert document["counts"]["failed"] == 0
    assert document["accuracy"]["cells"][1]["drop"] == pytest.approx(0.087654321)


def test_numbers_that_json_cannot_hold_become_null() -> None:
    """An infinite error is still JSON for every reader, and still a failure."""
    cell = replace(failing().cells[0], max_abs_error=float("inf"), verdict="failed", reason="inf")
    document = json.loads(json_text(replace(failing(), cells=(cell,))), parse_constant=pytest.fail)
    assert document["cells"][0]["max_abs_error"] is None
    assert document["verdict"] == "failed"
    VALIDATOR.validate(document)
