"""The gate against its own faults: each is planted in an artefact, and must be caught.

    python -m tests.benchmarks.bench_gate [--faults PATTERN] [--clean 1000] [--no-faults]
    pytest -m benchmark -s tests/benchmarks/bench_gate.py

Beside ``mtl-export parity``: Polygraphy's comparison (``pip install polygraphy``, 0.53.6 was
tried; ``not-run`` without it) and ``np.allclose(atol=1e-5)``, on the same answers. The last
line counts; the exit code is 1 if a fault is missed, or a correct export raises an alarm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mtl_export.parity.tolerance import FLOOR_FACTOR
from tests.benchmarks.gate import files, precision, quantised, routing, tokens, weights
from tests.benchmarks.gate.clean import CleanRun, clean_runs
from tests.benchmarks.gate.fault import Fault
from tests.benchmarks.gate.judges import CAUGHT, allclose, judge, polygraphy, verdict
from tests.benchmarks.gate.models import MODELS, write_dora, write_model
from tests.benchmarks.gate.project import MERGED, Project

FAULTS = (
    *weights.FAULTS, *routing.FAULTS, *precision.FAULTS, *tokens.FAULTS,
    *files.FAULTS, *quantised.FAULTS,
)  # fmt: skip
PEERS = {"polygraphy": polygraphy, "np.allclose": allclose}
WIDTH = 78


@dataclass(frozen=True)
class Row:
    """What three gates said of one fault.

    Attributes:
        fault: The fault.
        ours: ``caught`` or ``MISSED``.
        code: The exit code of ``mtl-export parity``.
        line: The line that says where, or why it counts as missed.
        peers: What the others said, by name.
    """

    fault: Fault
    ours: str
    code: int
    line: str
    peers: dict[str, str]


class Bench:
    """Projects with everything exported, made when first asked for.

    Args:
        folder: For the projects.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._projects: dict[str, Project] = {}

    def project(self, name: str) -> Project:
        """Return the exported project of a model; it passes, and is not to be changed."""
        if name not in self._projects:
            project = Project(self._folder / name, name)
            if name == "dora":
                write_dora(project.folder)
                project.export(MERGED)
            elif name == "quantised":
                project = quantised.write_quantised(project.folder)
            else:
                (model,) = (model for model in MODELS if model.name == name)
                write_model(model, project.folder)
                project.export()
            outcome = judge(project)
            assert outcome.code == 0, outcome.lines
            self._projects[name] = project
        return self._projects[name]

    def planted(self, fault: Fault) -> Project:
        """Return a copy of a project with ``fault`` in it, and nothing else exported."""
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        project = self.project(fault.model).copy(work)
        fault.plant(project)
        if fault.sealed:
            project.seal()
        project.keep(fault.artefact)
        return project

    def try_out(self, fault: Fault) -> Row:
        """Return what the gates say of ``fault``."""
        outcome = judge(self.planted(fault))
        ours, line = verdict(fault, outcome)
        peers = {name: gate(outcome, fault.artefact) for name, gate in PEERS.items()}
        return Row(fault, ours, outcome.code, line, peers)


def print_header() -> None:
    """Print what the columns are."""
    header = f"{'model':<8} {'fault':<46} {'planted in':<18} {'exit':>4} {'ours':<7} "
    print(header + " ".join(f"{name:<11}" for name in PEERS) + " where")


def print_row(row: Row) -> None:
    """Print one fault."""
    said = " ".join(f"{row.peers[name]:<11}" for name in PEERS)
    print(
        f"{row.fault.model:<8} {row.fault.name:<46} {row.fault.artefact or 'all':<18}"
        f" {row.code:>4} {row.ours:<7} {said} {row.line[:WIDTH]}",
        flush=True,
    )


def print_clean(runs: Sequence[CleanRun]) -> None:
    """Print how near correct exports come to the limit, by model and dtype."""
    print(f"\nerror / noise floor of correct exports; {FLOOR_FACTOR:g} are allowed")
    print(f"{'model':<12} {'dtype':<6} {'runs':>5} {'median':>7} {'99 %':>7} {'worst':>7}")
    for model, dtype in dict.fromkeys((run.model, run.dtype) for run in runs):
        floors = [run.floors for run in runs if (run.model, run.dtype) == (model, dtype)]
        median, high, worst = np.quantile(floors, [0.5, 0.99, 1.0])
        print(f"{model:<12} {dtype:<6} {len(floors):5d} {median:7.2f} {high:7.2f} {worst:7.2f}")
    for run in runs:
        if run.alarm:
            print(f"FALSE ALARM {run.model}, {run.layout}, {run.dtype}: {run.alarm}")


def summary(rows: Sequence[Row], runs: Sequence[CleanRun]) -> str:
    """Return the last lines: the others', then ours."""
    lines = []
    for name in PEERS:
        caught = sum(row.peers[name] == CAUGHT for row in rows)
        asked = [run for run in runs if run.peers.get(name) is not None]
        alarms = sum(run.peers[name] is True for run in asked)
        ran = bool(asked) or any(row.peers[name] != "not-run" for row in rows)
        text = f"{caught}/{len(rows)} caught, {alarms} false alarms in {len(asked)} clean runs"
        lines.append(f"{name}: {text if ran else 'not-run'}")
    caught = sum(row.ours == CAUGHT for row in rows)
    alarms = sum(bool(run.alarm) for run in runs)
    lines.append(f"{caught}/{len(rows)} caught, {alarms} false alarms in {len(runs)} clean runs")
    return "\n".join(lines)


def bench(folder: Path, faults: Sequence[Fault], clean: int) -> bool:
    """Print everything; return whether all is right."""
    stand = Bench(folder / "faults")
    rows = []
    print_header()
    for fault in faults:
        rows.append(stand.try_out(fault))
        print_row(rows[-1])
    runs = list(clean_runs(clean, folder / "clean"))
    print_clean(runs)
    print(summary(rows, runs))
    return all(row.ours == CAUGHT for row in rows) and not any(run.alarm for run in runs)


@pytest.mark.benchmark
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("default")
def test_every_fault_is_caught_and_nothing_else(tmp_path: Path) -> None:
    """All planted faults are caught with the right verdict; a hundred correct exports pass."""
    assert len(FAULTS) >= 40
    assert bench(tmp_path, FAULTS, 100)


def main(words: Sequence[str]) -> int:
    """Run the bench as the command line asks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", default="", help="pattern of 'model artefact: name'")
    parser.add_argument("--no-faults", action="store_true", help="clean runs only")
    parser.add_argument("--clean", type=int, default=1000, help="how many clean runs")
    asked = parser.parse_args(words)
    chosen = [
        fault
        for fault in FAULTS
        if not asked.no_faults
        and re.search(asked.faults, f"{fault.model} {fault.artefact}: {fault.name}")
    ]
    with tempfile.TemporaryDirectory(prefix="bench-gate-") as folder:
        return 0 if bench(Path(folder), chosen, asked.clean) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
