"""What ``measure`` measures, opened in this process: that calls do what their name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_export.bench.candidates import (
    Batches,
    EagerCandidate,
    OnnxCandidate,
)
from mtl_export.bench.measure import BatchShape, Candidate, Timings
from mtl_export.errors import EngineRunError
from mtl_export.graph.parts import trace_parts
from mtl_export.runtime.rows import Field
from tests.graph.seq2seq_toys import bound_toy
from tests.runtime.conftest import write_with_adapters

TASK_IDS = Field("task_ids", ("batch",), "int64")
GIVEN = {"alpha": None, "temperature": None, "task_names": None, "biases": None}


def phases(subject: Candidate, *, vocabulary: int = 50) -> dict[str, int]:
    """Open a subject, call it twice on each of two shapes, return steps by phase."""
    opened = subject.open()
    fields = opened.fields or (
        Field("input_ids", ("batch", "sequence"), "int64"),
        Field("attention_mask", ("batch", "sequence"), "int64"),
        TASK_IDS,
    )
    times: list[Timings] = []
    for shape in (BatchShape(1, 5), BatchShape(4, 9)):
        batch = Batches(vocabulary, (1, 0))(shape, fields)
        times = [opened.call(batch) for _ in range(2)]
        assert times[0].keys() == times[1].keys()
        assert all(second > 0 for call in times for steps in call.values() for second in steps)
    return {phase: len(steps) for phase, steps in times[0].items()}


def test_graphs_have_one_phase(exported: Path) -> None:
    """Single graph, merged graph and the unmerged model run forward."""
    onnx = exported / "out" / "onnx"
    assert phases(OnnxCandidate("single", onnx, threads=1)) == {"forward": 1}
    assert phases(OnnxCandidate("merged", onnx / "spam", threads=1)) == {"forward": 1}
    eager = EagerCandidate("eager", exported / "adapter", str(exported / "base"), GIVEN, threads=1)
    assert phases(eager) == {"forward": 1}


def test_language_models_have_two(language: Path) -> None:
    """One prompt and as many steps as asked for, in ONNX Runtime and in PyTorch."""
    folder = language / "onnx"
    for place in (folder, folder / "reply"):
        assert phases(OnnxCandidate("x", place, "prefill", 1, 3)) == {"prefill": 1, "decode": 3}
    eager = EagerCandidate("eager", language / "adapter", str(language / "base"), GIVEN, 1, 3)
    assert phases(eager) == {"prefill": 1, "decode": 3}


def test_adapters_are_read_for_all_graphs(language: Path, tmp_path: Path) -> None:
    """What is measured is the adapted model; a broken adapter is no figure."""
    source = language / "onnx" / "adapter-input"
    adapted = OnnxCandidate("x", source, "prefill", 1, 3, "reply")
    assert phases(adapted) == {"prefill": 1, "decode": 3}
    bound, folder = bound_toy("t5", tmp_path), tmp_path / "adapter-input"
    write_with_adapters(bound, trace_parts(bound), folder)
    subject = OnnxCandidate("x", folder, "encoder", 1, 3, "short")
    assert phases(subject) == {"prefill": 1, "decode": 3}
    (folder / "decoder_with_past.short.onnx_adapter").write_text("garbage")
    with pytest.raises(EngineRunError, match=r"decoder_with_past\.short\.onnx_adapter"):
        subject.open()


def test_eager_and_graph_read_the_same_batch(exported: Path) -> None:
    """A token outside the vocabulary fails in both: nothing is timed that does not compute."""
    graph = OnnxCandidate("x", exported / "out" / "onnx")
    eager = EagerCandidate("eager", exported / "adapter", str(exported / "base"), GIVEN)
    with pytest.raises(EngineRunError):
        phases(graph, vocabulary=9000)
    with pytest.raises(IndexError):
        phases(eager, vocabulary=9000)
