from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.checkpoint.base_model import SINGLE_FILE
from mtl_export.errors import BaseModelError
from mtl_export.merge.writer import write_merged
from mtl_export.runtime.runners.pytorch import (
    TORCH_DTYPES,
    MergedRunner,
    OracleRunner,
    oracle_model,
)
from tests.adapters import toys


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> BoundModel:
    """Return the toy checkpoint bound to the toy base."""
    return toys.toy_bound(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def folder(bound: BoundModel, tmp_path: Path) -> Path:
    """Return task 1 merged."""
    (tmp_path / "merged").mkdir()
    write_merged(bound, toys.TASKS[1], tmp_path / "merged")
    return tmp_path / "merged"


def test_the_oracle_is_the_unmerged_papers_model(bound: BoundModel) -> None:
    """Every adapted layer is the paper's module on the untouched base weight."""
    model = oracle_model(bound, torch.float64)
    assert not model.training
    for module in toys.MODULES:
        layer = model.model.get_submodule(module)
        assert isinstance(layer, MTLLoRALinear)
        np.testing.assert_array_equal(
            layer.base.weight.numpy(), bound.base_tensor(f"{module}.weight").numpy()
        )


def test_a_mixed_batch_is_its_rows_alone(bound: BoundModel) -> None:
    """The oracle answers each row as it would alone, in float64, -inf where a label is missing."""
    inputs = {**toys.token_rows(4, 7), "task_ids": np.array([2, 0, 1, 2])}
    with OracleRunner(bound, "fp64") as oracle:
        assert oracle.name == "oracle fp64"
        together = oracle.infer(inputs)["logits"]
        alone = [
            oracle.infer({n: v[row : row + 1] for n, v in inputs.items()})["logits"]
            for row in range(4)
        ]
    assert together.dtype == np.float64
    assert together.shape == (4, 4)
    expected = np.concatenate(alone)
    np.testing.assert_array_equal(np.isneginf(together), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(together[finite], expected[finite], atol=1e-12)
    widths = [len(toys.TASKS[task].labels) for task in inputs["task_ids"]]
    assert np.isneginf(together).sum(axis=1).tolist() == [4 - width for width in widths]


def test_lower_precisions_are_near_and_ordered(bound: BoundModel) -> None:
    """fp32 is nearer to fp64 than the halves are, and none is equal to it."""
    inputs = {**toys.token_rows(3, 7), "task_ids": np.arange(3)}
    answers = {}
    for dtype in TORCH_DTYPES:
        with OracleRunner(bound, dtype) as oracle:
            answers[dtype] = oracle.infer(inputs)["logits"]
    finite = np.isfinite(answers["fp64"])
    errors = {d: np.abs(a[finite] - answers["fp64"][finite]).max() for d, a in answers.items()}
    assert 0 < errors["fp32"] < 1e-4 < errors["fp16"] < errors["bf16"] < 1


def test_runners_must_be_entered(bound: BoundModel, folder: Path) -> None:
    """A runner answers only between enter and exit."""
    for runner in (OracleRunner(bound, "fp64"), MergedRunner(folder)):
        with pytest.raises(RuntimeError, match="enter the runner"):
            runner.infer({})
        with runner:
            pass
        with pytest.raises(RuntimeError, match="enter the runner"):
            runner.infer({})


def test_a_merged_folder_answers_as_the_oracle(bound: BoundModel, folder: Path) -> None:
    """The merged model takes no task_ids and gives its own task's logits."""
    inputs = toys.token_rows(4, 7)
    ids = np.full(4, 1)
    with OracleRunner(bound, "fp64") as oracle:
        expected = oracle.infer({**inputs, "task_ids": ids})["logits"]
    with MergedRunner(folder) as runner:
        found = runner.infer({**inputs, "task_ids": ids})["logits"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.mark.parametrize("fault", ["missing", "mismatched"])
def test_a_merged_folder_with_a_gap_is_refused(folder: Path, fault: str) -> None:
    """A weight that transformers would invent is named instead."""
    tensors = load_file(folder / SINGLE_FILE)
    if fault == "missing":
        del tensors["bert.pooler.dense.weight"]
    else:
        tensors["bert.pooler.dense.weight"] = np.ones((3, 3), np.float32)
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(BaseModelError) as caught, MergedRunner(folder):
        pass
    assert caught.value.problem.startswith(str(folder))
    assert fault in caught.value.problem
    assert "bert.pooler.dense.weight" in caught.value.problem
    assert "BertForSequenceClassification" in caught.value.expected
    assert "--force" in caught.value.fix
