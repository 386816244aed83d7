"""``mtl_export.build_engines``: the record of the command line, and nothing printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtl_export as mx
from mtl_export.api.trt import build_engines
from mtl_export.errors import UsageError
from tests.api.examples import run_example
from tests.cli.conftest import Run


def test_the_record_is_what_the_command_line_says(
    exported: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was built is found finished by the command line, with the same manifests."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built by tensorrt_rtx")
    run_example(build_engines)
    found = mx.build_engines("adapter", base="base", tasks=["spam"])
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert found.passed
    assert not found.failed
    document = run("trt", "--task", "spam", "--json").json
    (built,) = (one.as_dict() for one in found.built)
    (output,) = document["outputs"]
    assert {**built, "seconds": 0} == {**output, "seconds": 0}
    assert [one["path"] for one in document["onnx"]] == [str(one.path) for one in found.exported]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int8", "dtype": "fp16"}, "--dtype fp16 beside it"),
        ({"tasks": ["spam"], "inline": True}, "--inline"),
        ({"tasks": ["spam"], "task_input": "scalar"}, "--task-input scalar"),
        ({"normalize": True}, "no --pooling"),
        ({"layout": "task"}, "one of single-graph, per-task, both"),
        ({"opset": 7}, "one of"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, object], said: str) -> None:
    """Before anything is opened."""
    with pytest.raises(UsageError, match=said):
        mx.build_engines("adapter", base="base", **options)  # type: ignore[arg-type]
