from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtl_export.adapters.modules.save import save_checkpoint
from mtl_export.checkpoint.checkpoint import BaseReference
from mtl_export.checkpoint.folder import CONFIG_FILE, WEIGHTS_FILE, read_folder
from mtl_export.runtime.pytorch import oracle_model
from tests.adapters import toys


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_a_trained_model_is_saved_as_it_was_read(tmp_path: Path, diagonal: bool) -> None:
    """Reading a checkpoint into the module and saving it again gives the same bytes."""
    bound = toys.toy_bound(tmp_path, toys.checkpoint_parts(diagonal=diagonal))
    model = oracle_model(bound, torch.float32)
    save_checkpoint(model, tmp_path / "again", tasks=toys.TASKS, base=bound.checkpoint.base)
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
