from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from mtl_export.parity.reports.sarif import RULES, rule_of, sarif_text
from tests.parity.reports.samples import REPORTS, broken_off, failing, located, passing, scored

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}


def closed(required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no other."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


LOCATION = closed(
    "uri", uri={"type": "string", "format": "uri-reference"}, uriBaseId={"type": "string"}
)
LEVEL = {"enum": ["none", "note", "warning", "error"]}
# The part of the specification that parity writes; section numbers are those of SARIF 2.1.0.
RULE = closed(  # 3.49; code scanning also asks for fullDescription and help
    "id shortDescription fullDescription help",
    id={"type": "string"}, name={"type": "string"}, shortDescription=TEXT, fullDescription=TEXT,
    help=TEXT, defaultConfiguration=closed("", level=LEVEL),
)  # fmt: skip
RESULT = closed(  # 3.27
    "ruleId message locations partialFingerprints",
    ruleId={"enum": list(RULES)}, ruleIndex={"type": "integer", "minimum": 0}, level=LEVEL,
    message=TEXT, properties={"type": "object"},
    partialFingerprints={"type": "object", "additionalProperties": {"type": "string"}},
    locations={"type": "array", "items": closed("physicalLocation", physicalLocation=closed(
        "artifactLocation", artifactLocation=LOCATION,
        region=closed("startLine", startLine={"type": "integer", "minimum": 1}),
    ), logicalLocations={"type": "array", "items": closed(  # 3.33
        "fullyQualifiedName", fullyQualifiedName={"type": "string"}, kind={"const": "module"},
    )})},
)  # fmt: skip
INVOCATION = closed(  # 3.20
    "executionSuccessful",
    executionSuccessful={"type": "boolean"},
    toolExecutionNotifications={
        "type": "array",
        "items": closed("message", message=TEXT, level=LEVEL),
    },
)
ARTIFACT = closed(  # 3.24
    "location",
    location=LOCATION,
    roles={"type": "array", "items": {"enum": ["analysisTarget"]}, "uniqueItems": True},
    hashes={"type": "object", "additionalProperties": {"type": "string"}},
)
RUN = closed(  # 3.14
    "tool results",
    tool=closed("driver", driver=closed(
        "name", name={"type": "string"}, version={"type": "string"},
        rules={"type": "array", "items": RULE},
    )),
    automationDetails=closed("id", id={"type": "string"}),
    invocations={"type": "array", "items": INVOCATION},
    artifacts={"type": "array", "items": ARTIFACT, "uniqueItems": True},
    results={"type": "array", "items": RESULT},
    properties={"type": "object"},
)  # fmt: skip
LOG = {
    **closed("version runs", version={"const": "2.1.0"}, runs={"type": "array", "items": RUN}),
}
LOG["properties"] |= {"$schema": {"type": "string", "format": "uri"}}  # 3.13
VALIDATOR = Draft202012Validator(LOG)


def run_of(text: str) -> dict[str, Any]:
    """Return the one run of a log."""
    (run,) = json.loads(text)["runs"]
    found: dict[str, Any] = run
    return found


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_satisfies_the_specification(kind: str) -> None:
    """Names, types and required parts are SARIF's."""
    VALIDATOR.validate(json.loads(sarif_text(REPORTS[kind]())))


def test_the_check_can_fail() -> None:
    """A property that SARIF does not have is refused."""
    log = json.loads(sarif_text(failing()))
    log["runs"][0]["results"][0]["severity"] = "high"
    with pytest.raises(ValidationError):
        VALIDATOR.validate(log)


def test_every_failed_cell_is_a_result_and_nothing_else_is() -> None:
    """Code scanning shows every result as an alert."""
    failed = [cell for cell in failing().cells if cell.verdict == "failed"]
    results = run_of(sarif_text(failing()))["results"]
    assert len(results) == len(failed)
    for cell in failed:
        assert any(one["message"]["text"].endswith(f": {cell.reason}") for one in results)
    assert run_of(sarif_text(passing()))["results"] == []


def test_a_result_names_the_layer_where_the_error_begins() -> None:
    """As a place in the model and in the message; the same alert as without."""
    results = run_of(sarif_text(located()))["results"]
    layer = located().localised[0].findings[0].layer
    named = [one for one in results if one["properties"].get("layer") == layer]
    (first,) = [one for one in named if ", task ads_rel, " in one["message"]["text"]]
    assert first["message"]["text"].endswith("; bert.encoder.layer.0.query is wrong: Lambda is"
                                             " <transposed>")  # fmt: skip
    assert first["locations"][0]["logicalLocations"] == [
        {"fullyQualifiedName": layer, "kind": "module"}
    ]
    assert first["properties"]["cause"] == "Lambda is <transposed>"
    prints = [one["partialFingerprints"] for one in results]
    assert prints == [r["partialFingerprints"] for r in run_of(sarif_text(failing()))["results"]]


def test_each_kind_of_failure_has_its_rule() -> None:
    """The samples break every rule there is."""
    broken = {rule_of(cell) for cell in failing().cells if cell.verdict == "failed"}
    assert broken == set(RULES) - {"parity-accuracy"}
    for result in run_of(sarif_text(failing()))["results"]:
        assert list(RULES)[result["ruleIndex"]] == result["ruleId"]


def test_a_score_that_drops_is_a_result_and_one_that_cannot_tell_a_note() -> None:
    """Each at its artefact's file, with its numbers."""
    run = run_of(sarif_text(scored()))
    first, second = run["results"]
    assert first["ruleId"] == second["ruleId"] == "parity-accuracy"
    assert first["properties"]["candidate"] == 0.9
    place = first["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "out/onnx/model.onnx"
    notes = [one["message"]["text"] for one in run["invocations"][0]["toolExecutionNotifications"]]
    assert any("cannot tell" in note for note in notes)
    assert len(notes) == 3


def test_a_result_lies_in_the_artefacts_file() -> None:
    """A path is relative to the repository; one outside of it is a file URI; both are quoted."""
    run = run_of(sarif_text(failing()))
    places = {
        place["physicalLocation"]["artifactLocation"]["uri"]
        for result in run["results"]
        for place in result["locations"]
    }
    assert places == {
        "out/onnx/model.onnx",
        "out/merged/ads%20rel/model.safetensors",
        "file:///elsewhere/topic/config.json",
    }
    known = {file["location"]["uri"]: file["hashes"]["sha-256"] for file in run["artifacts"]}
    assert places <= set(known)
    assert known["out/onnx/model.onnx.data"] == "d" * 64


def test_the_same_failure_is_the_same_alert() -> None:
    """The fingerprint does not depend on the numbers, and differs between cells."""
    first = run_of(sarif_text(failing()))["results"]
    prints = {one["partialFingerprints"]["cell/v1"] for one in first}
    assert len(prints) == len(first)
    worse = tuple(
        replace(cell, max_abs_error=1.0) if cell.max_abs_error == 7.123456789e-4 else cell
        for cell in failing().cells
    )
    again = run_of(sarif_text(replace(failing(), cells=worse)))["results"]
    assert {one["partialFingerprints"]["cell/v1"] for one in again} == prints


def test_what_did_not_run_is_a_note_and_our_error_an_error() -> None:
    """Neither looks like a run that found nothing."""
    (invocation,) = run_of(sarif_text(failing()))["invocations"]
    (note,) = invocation["toolExecutionNotifications"]
    assert invocation["executionSuccessful"]
    assert note == {
        "level": "note", "message": {"text": "not run: engine, spam: no GPU & no <driver>"},
    }  # fmt: skip
    (invocation,) = run_of(sarif_text(broken_off()))["invocations"]
    assert not invocation["executionSuccessful"]
    assert invocation["toolExecutionNotifications"][0]["level"] == "error"
