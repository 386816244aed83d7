"""A few faults of ``tests/benchmarks/bench_gate.py``, of each kind, on the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.bench_gate import FAULTS, Bench
from tests.benchmarks.gate.fault import Fault
from tests.benchmarks.gate.judges import CAUGHT, judge, verdict

CHOSEN = {
    "Lambda transposed", "one layer unmerged", "routing frozen at the traced ids",
    "unknown id: the base answers", "names of two tasks swapped in the file",
    "wrong dtype: logits in fp64", "tokenizer swapped", "label names swapped",
    "external data truncated", "output renamed", "output extra",
}  # fmt: skip
SOME = [fault for fault in FAULTS if fault.model == "roberta" and fault.name in CHOSEN]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Give the bench; its project is exported once, and passes."""
    stand = Bench(tmp_path_factory.mktemp("gate"))
    stand.project("roberta")
    return stand


@pytest.mark.parametrize("fault", SOME, ids=lambda fault: f"{fault.name}, {fault.artefact}")
def test_a_planted_fault_is_caught(bench: Bench, fault: Fault) -> None:
    """The exit code is the right one, and a line says where."""
    outcome = judge(bench.planted(fault))
    said, line = verdict(fault, outcome)
    assert said == CAUGHT, line


def test_the_bench_has_the_faults_it_promises() -> None:
    """At least forty, of all three kinds of model, none of them twice."""
    assert len(FAULTS) >= 40
    assert {"roberta", "llama", "t5"} <= {fault.model for fault in FAULTS}
    assert len({(fault.name, fault.model, fault.artefact) for fault in FAULTS}) == len(FAULTS)
    assert {fault.name for fault in SOME} == CHOSEN


def test_a_gate_that_says_nothing_misses(bench: Bench) -> None:
    """An unplanted fault counts as missed: the bench cannot pass by itself."""
    outcome = judge(bench.project("roberta"))
    for fault in SOME:
        assert verdict(fault, outcome)[0] != CAUGHT


def test_folders_of_the_bench_are_left_alone(bench: Bench, tmp_path: Path) -> None:
    """A fault is planted in a copy."""
    before = sorted(path.stat().st_mtime_ns for path in bench.project("roberta").out.rglob("*"))
    bench.planted(SOME[0])
    after = sorted(path.stat().st_mtime_ns for path in bench.project("roberta").out.rglob("*"))
    assert before == after
