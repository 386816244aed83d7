"""Checkpoints freshly written by AdapterHub's own library, in an environment of its own.

Opt-in: ``pytest -m adapters_env tests/environments/test_adapterhub.py``. It makes a virtual
environment and installs ``adapters`` there, unless ADAPTERS_PYTHON names a Python that has it.
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
from mtl_export.graph.lower import routed_graph
from mtl_export.graph.trace import trace
from mtl_export.graph.writer import write_graph
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.ort import OrtRunner
from mtl_export.runtime.runners.pytorch import MergedRunner, OracleRunner

pytestmark = [pytest.mark.adapters_env, pytest.mark.timeout(1800)]

REQUIREMENTS = ("adapters==1.3.0", "torch==2.13.0")
# What float32 does to these random models, next to logits of this size.
FLOAT32_NOISE = 2e-5
CASES = (
    "bert_bare", "bert_dora", "bert_ia3", "bert_lora", "bert_mixed", "bert_multilabel",
    "bert_one_layer", "bert_pooler", "bert_pooler_two_layers", "bert_static",
    "bert_static_whole", "bert_tagging", "bert_tagging_two_layers", "bert_three_layers",
    "bert_two_layers", "bert_unshared", "bert_whole", "distilbert_two_layers", "llama_causal",
    "llama_causal_tied", "llama_one_layer", "llama_two_layers", "roberta_static",
    "roberta_two_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint, bound to its base, and the library's answers.

    Attributes:
        bound: The checkpoint and its base.
        output: Name of the output compared.
        inputs: By name.
        expected: Per task in id order, all rows under that task, float64.
    """

    bound: BoundModel
    output: str
    inputs: dict[str, Array]
    expected: tuple[Array, ...]

    @property
    def tolerance(self) -> float:
        """Return what float32 may do."""
        return FLOAT32_NOISE * max(1.0, *(float(np.abs(e).max()) for e in self.expected))

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
        answers = infer({**self.inputs, "task_ids": mixed})[self.output]
        errors = [self.error(answers[mixed == task], task, mixed == task) for task in tasks]
        for task in tasks:
            uniform = np.full(row_count, task, np.int64)
            answers = infer({**self.inputs, "task_ids": uniform})[self.output]
            errors.append(self.error(answers, task))
        return max(errors)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all cases with the library, once."""
    python = os.environ.get("ADAPTERS_PYTHON")
    if python is None:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=True)
        python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    out = tmp_path_factory.mktemp("adapterhub")
    script = Path(__file__).with_name("adapterhub_write.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, str(script), str(out)], check=True, cwd=out, env=environment)
    return out


def opened(written: Path, name: str) -> Case:
    """Return one case, its task order given only where the files lost it."""
    folder = written / "cases" / name
    facts = json.loads((folder / "case.json").read_text())
    checkpoint = open_checkpoint(
        folder, task_names=None if facts["save"] == "setup" else facts["tasks"]
    )
    assert [task.name for task in checkpoint.tasks] == facts["tasks"]
    base = open_base(str(written / "bases" / facts["base"]))
    with np.load(folder / "reference.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    output = facts["output"]
    expected = tuple(arrays.pop(f"{output}_{task}") for task in facts["tasks"])
    bound = bind(checkpoint, read_adapters(checkpoint, base), base)
    return Case(bound, output, arrays, expected)


def test_every_case_is_tested(written: Path) -> None:
    """The script writes the cases that this file names, no more and no fewer."""
    assert sorted(CASES) == sorted(path.name for path in (written / "cases").iterdir())


@pytest.mark.parametrize("name", CASES)
def test_oracle(written: Path, name: str) -> None:
    """The unmerged model in float64 answers what the library answers in float64."""
    case = opened(written, name)
    with OracleRunner(case.bound, "fp64") as runner:
        assert case.routed_error(runner.infer) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_single_graph(written: Path, name: str, tmp_path: Path) -> None:
    """One ONNX graph serves all tasks, mixed batch included."""
    case = opened(written, name)
    write_graph(routed_graph(trace(case.bound), case.bound), case.bound, tmp_path, None)
    with OrtRunner(tmp_path / "model.onnx") as runner:
        assert case.routed_error(runner.infer) < case.tolerance


@pytest.mark.parametrize("name", CASES)
def test_merged(written: Path, name: str, tmp_path: Path) -> None:
    """Each task's merged folder answers alike; the base is hashed on the way, and rightly."""
    case = opened(written, name)
    for task in case.bound.adapters.tasks:
        folder = tmp_path / task.name
        folder.mkdir()
        write_merged(case.bound, task, folder)
        with MergedRunner(folder) as runner:
            found = runner.infer(case.inputs)[case.output]
        assert found.shape == case.expected[task.index].shape
        assert case.error(found, task.index) < case.tolerance
    assert case.bound.base.sha256 == open_base(case.bound.base.reference).sha256
