from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mtl_export.adapters.modules.model import MultiTaskModel
from mtl_export.adapters.modules.save import save_checkpoint
from mtl_export.adapters.modules.ta_lora import Gate, TALoRALinear
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference
from mtl_export.checkpoint.formats.own_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_folder,
    store_checkpoint,
)
from mtl_export.checkpoint.reader import open_checkpoint
from mtl_export.errors import CheckpointError, OutputError
from mtl_export.runtime.runners.pytorch import oracle_model
from tests.adapters import toys
from tests.factories import HIDDEN


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_a_trained_model_is_saved_as_it_was_read(tmp_path: Path, diagonal: bool) -> None:
    """Reading a checkpoint into the module and saving it again gives the same bytes."""
    bound = toys.toy_bound(tmp_path, toys.checkpoint_parts(diagonal=diagonal))
    model = oracle_model(bound, torch.float32)
    save_checkpoint(model, str(tmp_path / "again"), tasks=toys.TASKS, base=bound.checkpoint.base)
    with pytest.raises(OutputError, match="overwrite=True"):
        save_checkpoint(model, tmp_path / "again", tasks=toys.TASKS, base=bound.checkpoint.base)
    save_checkpoint(
        model, tmp_path / "again", tasks=toys.TASKS, base=bound.checkpoint.base, overwrite=True
    )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()


def test_a_float64_model_keeps_its_digits(tmp_path: Path) -> None:
    """Training in float64 is saved in float64."""
    bound = toys.toy_bound(tmp_path, toys.checkpoint_parts(dtype="F64"))
    model = oracle_model(bound, torch.float64)
    save_checkpoint(model, tmp_path / "again", tasks=toys.TASKS, base=BaseReference())
    saved = read_folder(tmp_path / "again").layers["bert.pooler.dense"].tensors["up"]
    assert saved.dtype == "F64"
    stored = bound.checkpoint.layers["bert.pooler.dense"].tensors["up"]
    np.testing.assert_array_equal(saved.numpy(), stored.numpy())


def test_a_bfloat16_model_is_widened_without_loss(tmp_path: Path) -> None:
    """Half-precision training is stored as float32, value for value."""
    bound = toys.toy_bound(tmp_path)
    model = oracle_model(bound, torch.bfloat16)
    save_checkpoint(model, tmp_path / "again", tasks=toys.TASKS, base=BaseReference())
    saved = read_folder(tmp_path / "again").layers["bert.pooler.dense"].tensors["down"]
    assert saved.dtype == "F32"
    module = model.model.get_submodule("bert.pooler.dense")
    values = module.tensors()["down"].to(torch.float32)  # type: ignore[operator]
    np.testing.assert_array_equal(saved.numpy(), values.numpy())


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_trained_ta_lora_model_is_read_back_with_the_same_outputs(
    tmp_path: Path, gate: Gate
) -> None:
    """A model trained with one shared task embedding: saved, bound, run unmerged and saved again.

    The logits are the trained model's own, and saving what was read gives the same bytes.
    """
    toys.toy_bound(tmp_path)
    trained = ta_lora_model(tmp_path / "base", gate)
    rows = {name: torch.from_numpy(v) for name, v in toys.token_rows(3, 6).items()}
    rows["task_ids"] = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = trained(**rows)["logits"]
    reference = BaseReference("toy/bert", open_base(str(tmp_path / "base")).sha256)
    save_checkpoint(trained, tmp_path / "saved", tasks=toys.TASKS, base=reference)
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.family == "ta_lora"
    bound = toys.bound_model(tmp_path / "base", tmp_path / "saved")
    model = oracle_model(bound, torch.float64)
    with torch.no_grad():
        found = model(**rows)["logits"]
    for row, task in enumerate(rows["task_ids"].tolist()):
        labels = len(toys.TASKS[task].labels)
        torch.testing.assert_close(found[row, :labels], expected[row, :labels], atol=1e-9, rtol=0)
    save_checkpoint(model, tmp_path / "again", tasks=toys.TASKS, base=reference)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def ta_lora_model(base: Path, gate: Gate) -> MultiTaskModel:
    """Return a float64 model on ``base`` whose adapters were moved away from their start."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(base, dtype=torch.float64)
    embedding = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    adapted = MultiTaskModel(
        model.eval(),
        adapters={
            name: partial(
                TALoRALinear, task_embedding=embedding, rank=2, branches=2, alpha=3.0, gate=gate,
                up_std=0.4,
            )
            for name in toys.MODULES
        },
        heads={
            toys.HEAD: [
                nn.Linear(HIDDEN, len(task.labels), dtype=torch.float64)
                for task in toys.TASKS
            ]
        },
    )  # fmt: skip
    return adapted.eval()


def test_labels_that_the_head_has_no_rows_for_are_refused_when_saved_and_read(
    tmp_path: Path,
) -> None:
    """The task, its labels and the rows are named; nothing is written."""
    bound = toys.toy_bound(tmp_path)
    model = oracle_model(bound, torch.float32)
    task = toys.TASKS[0]
    wrong = (dataclasses.replace(task, labels=(*task.labels, "extra")), *toys.TASKS[1:])
    with pytest.raises(CheckpointError, match=f"task {task.name} has .* labels .*extra.* rows"):
        save_checkpoint(model, tmp_path / "again", tasks=wrong, base=BaseReference())
    assert not (tmp_path / "again").exists()
    contradictory = dataclasses.replace(bound.checkpoint, tasks=wrong)
    store_checkpoint(tmp_path / "second", contradictory)
    with pytest.raises(CheckpointError, match=f"task {task.name} has"):
        open_checkpoint(tmp_path / "second")
