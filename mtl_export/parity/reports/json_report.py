"""A report as JSON: everything the record holds, under a schema that is published.

``parity.schema.json`` in this folder is the schema, in JSON Schema 2020-12. The report's
``schema`` key names its version, ``mtl-export.parity/1``: within one version keys are only
added, so a reader ignores what it does not know.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.json_file import read_json
from mtl_export.parity.report import ParityReport

SCHEMA_FILE = Path(__file__).with_name("parity.schema.json")


def json_text(report: ParityReport) -> str:
    """Return the report as a JSON document; a number that is not finite becomes null."""
    return json.dumps(document(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def document(report: ParityReport) -> dict[str, Any]:
    """Return the report as JSON's types, each number finite or None."""
    finite: dict[str, Any] = _finite(report.as_dict())
    return finite


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema that every report satisfies."""
    schema: dict[str, Any] = read_json(SCHEMA_FILE)
    return schema


def _finite(value: Any) -> Any:
    # JSON has no word for Inf or NaN, and Python's is refused by other readers.
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
