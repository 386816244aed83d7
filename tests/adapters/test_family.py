from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.family import FAMILIES, family_named, read_adapters
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint
from mtl_export.checkpoint.formats.own_folder import read_folder
from mtl_export.errors import AdapterError, CheckpointError
from tests.adapters import toys


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Return the toy checkpoint, read from disk."""
    parts = toys.checkpoint_parts()
    return read_folder(toys.write_checkpoint(tmp_path / "adapter", parts, BaseReference()))


def test_layers_and_heads_keep_their_names_and_order(checkpoint: Checkpoint) -> None:
    """The normal form has the checkpoint's modules, and heads in id order."""
    parts = toys.checkpoint_parts()
    adapters = read_adapters(checkpoint)
    assert sorted(adapters.layers) == sorted(toys.MODULES)
    assert adapters.checkpoint_sha256 == checkpoint.sha256
    assert adapters.tasks == toys.TASKS
    for task, head in zip(adapters.tasks, adapters.heads[toys.HEAD], strict=True):
        weight, bias = parts["heads"][toys.HEAD][task.name]
        np.testing.assert_array_equal(head.weight, weight)
        np.testing.assert_array_equal(head.bias, bias)


def test_a_head_without_bias_gets_zeros(tmp_path: Path) -> None:
    """A head stored without bias adds nothing."""
    parts = toys.checkpoint_parts()
    weight, _ = parts["heads"][toys.HEAD]["topics"]
    parts["heads"][toys.HEAD]["topics"] = (weight, None)
    toys.write_checkpoint(tmp_path / "a", parts, BaseReference())
    head = read_adapters(read_folder(tmp_path / "a")).heads[toys.HEAD][1]
    np.testing.assert_array_equal(head.bias, np.zeros(4, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_all_at_once(tmp_path: Path, bad: float) -> None:
    """NaN and Inf are found in adapters and heads, counted, and placed."""
    parts = toys.checkpoint_parts()
    module = "bert.pooler.dense"
    parts["layers"][module]["up"][1, 3, 2] = bad
    parts["heads"][toys.HEAD]["topics"][1][2] = bad
    toys.write_checkpoint(tmp_path / "a", parts, BaseReference())
    with pytest.raises(CheckpointError) as caught:
        read_adapters(read_folder(tmp_path / "a"))
    assert caught.value.problem.startswith(str(tmp_path / "a"))
    assert f"'layers.{module}.up' (1 values, first at [1, 3, 2])" in caught.value.problem
    assert f"'heads.1.{toys.HEAD}.bias' (1 values, first at [2])" in caught.value.problem
    assert caught.value.expected == "finite numbers"
    assert caught.value.fix


def test_an_unknown_family_is_refused_with_the_known_ones(checkpoint: Checkpoint) -> None:
    """A family from the future is named, with what this version knows."""
    with pytest.raises(AdapterError) as caught:
        read_adapters(replace(checkpoint, family="quantum_lora"))
    assert "quantum_lora" in caught.value.problem
    assert "mtl_lora" in caught.value.expected
    assert caught.value.fix


def test_every_family_has_its_own_name_paper_and_oracle() -> None:
    """Rows of the catalogue are distinct and their oracle classes exist."""
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family_named(family.name) is family
        assert family.paper.startswith("https://")
        if not family.oracle:
            continue
        module, _, name = family.oracle.partition(":")
        assert hasattr(getattr(import_module(module), name), "from_tensors")
