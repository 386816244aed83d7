"""Checkpoints freshly written by PEFT itself, in an environment of its own.

Opt-in: ``pytest -m peft_env tests/environments/test_peft.py``. It makes a virtual environment
and installs ``peft`` there, unless PEFT_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import GraphError
from mtl_export.graph.lower import merged_graph, routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner

pytestmark = [pytest.mark.peft_env, pytest.mark.timeout(1800)]

REQUIREMENTS = ("peft==0.21.2", "torch==2.13.0", "transformers==5.23.0")
# What float32 does to these random models, next to logits of this size.
FLOAT32_NOISE = 2e-5
# PEFT changes the base in float32, whatever it computes in afterwards.
CHANGED_BASE = frozenset({"pissa", "olora", "kasa", "gpt2"})
CASES = (
    "alone", "bias", "distilbert", "dora", "embeddings", "gpt2", "gpt2_bias", "kasa", "llama",
    "llama_causal", "lora", "lora_bias", "olora", "pissa", "plain_inits", "roberta", "tagging",
    "together", "tokens", "whole",
)  # fmt: skip
# What one graph cannot hold, and what its refusal is about.
MERGED_ONLY = {"gpt2_causal": "lm_head", "adapted_and_whole": "replaced it whole"}


@dataclass(frozen=True)
class Case:
    """One checkpoint, bound to its base, and PEFT's answers.

    Attributes:
        bound: The checkpoint and its base.
        inputs: By name.
        expected: Per task in id order, all rows under that task, float64.
    """

    bound: BoundModel
    inputs: dict[str, Array]
    expected: tuple[Array, ...]

    def tolerance(self) -> float:
        """Return what float32 may do: relative to the logits, or to the oracle's own error."""
        with OracleRunner(self.bound, "fp32") as runner:
            floor = self.routed_error(runner.infer)
        largest = max(float(np.abs(expected).max()) for expected in self.expected)
        return max(FLOAT32_NOISE * largest, FLOAT32_NOISE, 4 * floor)

    def error(self, found: Array, task: int, rows: Array | slice = slice(None)) -> float:
        """Return the largest error over the tokens that are not padding."""
        expected = self.expected[task][rows]
        own = found[..., : expected.shape[-1]]
        if expected.ndim == 3:
            real = self.inputs["attention_mask"][rows].astype(bool)
            own, expected = own[real], expected[real]
        return float(np.abs(own - expected).max())

    def routed_error(self, infer: Callable[[dict[str, Array]], dict[str, Array]]) -> float:
        """Return the largest error of a model of all tasks: uniform batches, and a mixed one."""
        row_count, tasks = len(self.inputs["input_ids"]), range(len(self.expected))
        mixed = np.arange(row_count) % len(tasks)
        answers = infer({**self.inputs, "task_ids": mixed})["logits"]
        errors = [self.error(answers[mixed == task], task, mixed == task) for task in tasks]
        for task in tasks:
            uniform = np.full(row_count, task, np.int64)
            errors.append(self.error(infer({**self.inputs, "task_ids": uniform})["logits"], task))
        return max(errors)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all cases with PEFT, once."""
    python = os.environ.get("PEFT_PYTHON")
    if python is None:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=True)
        python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    out = tmp_path_factory.mktemp("peft")
    script = Path(__file__).with_name("peft_generate.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, str(script), str(out)], check=True, cwd=out, env=environment)
    return out


def opened(written: Path, name: str) -> Case:
    """Return one case, its task order given where there is more than one task."""
    folder = written / "cases" / name
    facts = json.loads((folder / "case.json").read_text())
    names = facts["tasks"]
    checkpoint = open_checkpoint(folder, task_names=names)
    assert [task.name for task in checkpoint.tasks] == names
    base = open_base(str(written / "bases" / facts["base"]))
    with np.load(folder / "reference.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    expected = tuple(arrays.pop(f"logits_{task}") for task in names)
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    return Case(bound, arrays, expected)


def test_every_case_is_tested(written: Path) -> None:
    """The script writes the cases that this file names, no more and no fewer."""
    found = sorted(path.name for path in (written / "cases").iterdir())
    assert found == sorted([*CASES, *MERGED_ONLY])


@pytest.mark.parametrize("name", [*CASES, *MERGED_ONLY])
def test_oracle(written: Path, name: str) -> None:
    """The unmerged model in float64 answers what PEFT answers in float64."""
    case = opened(written, name)
    with OracleRunner(case.bound, "fp64") as runner:
        error = case.routed_error(runner.infer)
    assert error < (case.tolerance() if name in CHANGED_BASE else 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_graphs(written: Path, name: str, tmp_path: Path) -> None:
    """One ONNX graph serves all tasks, mixed batch included; so does each task's own."""
    case = opened(written, name)
    tolerance = case.tolerance()
    traced = trace(case.bound)
    folder = tmp_path / "single graph"
    folder.mkdir()
    write_graph(routed_graph(traced, case.bound), case.bound, folder, None)
    with OrtRunner(folder / "model.onnx") as runner:
        assert case.routed_error(runner.infer) < tolerance
        count = len(case.expected)
        bad = np.array([0, count, -1, 0, 2**40])
        answers = runner.infer({**case.inputs, "task_ids": bad})["logits"]
    assert np.isnan(answers[[1, 2, 4]]).all()
    assert case.error(answers[[0, 3]], 0, np.array([0, 3])) < tolerance
    for task in case.bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_graph(merged_graph(traced, case.bound, task), case.bound, folder, task)
        with OrtRunner(folder / "model.onnx") as runner:
            found = runner.infer(case.inputs)["logits"]
        assert found.shape == case.expected[task.index].shape
        assert case.error(found, task.index) < tolerance


@pytest.mark.parametrize("name", [*CASES, *MERGED_ONLY])
def test_merged(written: Path, name: str, tmp_path: Path) -> None:
    """Each task's merged folder answers alike."""
    case = opened(written, name)
    tolerance = case.tolerance()
    for task in case.bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_merged(case.bound, task, folder)
        with MergedRunner(folder) as runner:
            found = runner.infer(case.inputs)["logits"]
        assert found.shape == case.expected[task.index].shape
        assert case.error(found, task.index) < tolerance


@pytest.mark.parametrize("name", MERGED_ONLY)
def test_what_one_graph_cannot_hold_is_refused(written: Path, name: str) -> None:
    """The reason is named, and per-task export as the way out."""
    case = opened(written, name)
    with pytest.raises(GraphError, match=MERGED_ONLY[name]) as caught:
        routed_graph(trace(case.bound), case.bound)
    assert "per task" in caught.value.fix
