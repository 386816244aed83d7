from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mtl_export_calibration.cache as cache_module
import mtl_export_calibration.measure as measure_module
from mtl_export.errors import BackendMissingError, UsageError
from mtl_export_calibration import modelopt
from mtl_export_calibration.collect import collect
from mtl_export_calibration.engines import engine_named, refuse_combination
from mtl_export_calibration.formats import FP8, INT4, INT8, NumberFormat
from mtl_export_calibration.measure import ExportedGraph, Options, Work, measure
from tests.calibration import toys


def work(folder: Path, engine: str) -> Work:
    """Return the toy's work."""
    graph = toys.write_graph(folder / "graph")
    rows = toys.samples(4)
    options = Options(INT8, "max", threads=1, engine=engine)
    return Work(toys.bound(), (ExportedGraph(graph, None),), rows, rows, options, folder / "cache")


def test_the_default_engine_needs_nothing_more() -> None:
    """ONNX Runtime with our own calibrators."""
    assert engine_named("onnxruntime", "max", INT8) is collect


def test_an_unknown_engine_is_refused() -> None:
    """The message names those that there are."""
    with pytest.raises(BackendMissingError, match=r"none of that name.*onnxruntime or modelopt"):
        engine_named("other", "max", INT8)


def test_modelopt_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how, and that it can do without."""
    monkeypatch.setattr(modelopt, "find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match=r"modelopt: not installed") as caught:
        engine_named("modelopt", "max", INT8)
    assert caught.value.fix.startswith("pip install 'mtl-export[quant]'")


def test_modelopt_must_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of its own that is missing is named."""

    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'requests'")

    monkeypatch.setattr(modelopt, "find_spec", lambda name: object())
    monkeypatch.setattr(modelopt, "import_module", broken)
    with pytest.raises(BackendMissingError, match=r"cannot be imported .*'requests'"):
        engine_named("modelopt", "max", INT8)


@pytest.mark.parametrize(
    ("method", "number", "reason"),
    [
        ("entropy", FP8, "evenly spaced numbers"),
        ("max", INT4, "format of weights alone"),
    ],
)
def test_modelopt_is_not_asked_what_it_cannot(
    method: str, number: NumberFormat, reason: str
) -> None:
    """Refused before its package is looked for."""
    with pytest.raises(UsageError, match=reason):
        engine_named("modelopt", method, number)


def test_weights_of_tasks_are_ours_alone() -> None:
    """Another's calibrators do not weigh values."""
    refuse_combination("modelopt", "union")
    refuse_combination("modelopt", None)
    refuse_combination("onnxruntime", "weighted")
    with pytest.raises(UsageError, match="--engine modelopt --combine weighted"):
        refuse_combination("modelopt", "weighted")


def test_ranges_of_one_engine_are_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept serves the same engine in the same version alone."""
    versions = {"nvidia-modelopt": "0.47.0", "torch": "2.13.0", "onnx-ir": "1.1.0"}
    monkeypatch.setattr(cache_module, "version", versions.__getitem__)
    asked: list[str] = []

    def engine(name: str, *_: object) -> Any:
        asked.append(name)
        return collect

    monkeypatch.setattr(measure_module, "engine_named", engine)

    def asked_by(todo: Work) -> Sequence[str]:
        asked.clear()
        measure(todo)
        return sorted(set(asked))

    ours, theirs = work(tmp_path, "onnxruntime"), work(tmp_path, "modelopt")
    assert asked_by(ours) == ["onnxruntime"]
    assert asked_by(ours) == []
    assert asked_by(theirs) == ["modelopt"]
    assert asked_by(replace(theirs)) == []
    versions["nvidia-modelopt"] = "0.48.0"
    assert asked_by(replace(theirs)) == ["modelopt"]
    assert asked_by(replace(ours)) == ["onnxruntime"]  # one file: the last engine's ranges
    assert "nvidia-modelopt" not in ours.key(ours.targets[0])["versions"]
