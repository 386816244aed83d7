from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import bind
from mtl_export.adapters.family import read_adapters
from mtl_export.adapters.preflight import read_all
from mtl_export.checkpoint.base_model import open_base
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint, LayerTensors
from mtl_export.checkpoint.formats.own_folder import read_folder
from mtl_export.errors import BaseModelError, CheckpointError, HyperparameterError
from tests.adapters import toys
from tests.checkpoint.own_toys import with_members
from tests.factories import toy_base

QUERY, POOLER = "bert.encoder.layer.0.attention.self.query", "bert.pooler.dense"


def broken(checkpoint: Checkpoint, module: str) -> Checkpoint:
    """Return ``checkpoint`` with an up-projection of another rank in one layer."""
    layer = checkpoint.layers[module]
    tensors = dict(layer.tensors) | {"up": toys.memory_tensor("up", np.ones((2, 12, 9)))}
    return replace(
        checkpoint,
        layers=dict(checkpoint.layers) | {module: LayerTensors(module, tensors, layer.hyper)},
    )


def test_all_broken_layers_and_numbers_are_one_message(tmp_path: Path) -> None:
    """NaN in one layer and wrong shapes in two others are all named at once."""
    parts = toys.checkpoint_parts()
    parts["layers"]["bert.encoder.layer.1.output.dense"]["down"][0, 0] = np.nan
    folder = toys.write_checkpoint(tmp_path / "a", parts, BaseReference())
    checkpoint = broken(broken(read_folder(folder), QUERY), POOLER)
    with pytest.raises(CheckpointError) as caught:
        read_adapters(checkpoint)
    assert caught.value.problem.startswith(f"{folder}: 3 problems: ")
    for text in (
        "NaN or Inf in 'layers.bert.encoder.layer.1.output.dense.down'",
        f"{QUERY}: ",
        POOLER,
    ):
        assert text in caught.value.problem
    assert caught.value.expected
    assert caught.value.fix


def test_a_single_problem_is_said_as_it_is(tmp_path: Path) -> None:
    """One broken layer keeps its own message."""
    folder = toys.write_checkpoint(tmp_path / "a", toys.checkpoint_parts(), BaseReference())
    with pytest.raises(CheckpointError) as caught:
        read_adapters(broken(read_folder(folder), QUERY))
    assert caught.value.problem.startswith(QUERY)


def test_every_task_of_its_own_is_read() -> None:
    """Two members, each broken, are one message that names both."""
    checkpoint = with_members()
    with pytest.raises(CheckpointError) as caught:
        read_adapters(checkpoint)
    for task in checkpoint.tasks:
        assert f"{task.name}: a.words: down [1, 4], scaler []" in caught.value.problem


def test_another_base_is_told_by_shapes_and_hash(tmp_path: Path) -> None:
    """Shapes that do not fit and the hash that differs are one message."""
    trained_on = BaseReference("toy/bert", "ab" * 32)
    folder = toys.write_checkpoint(tmp_path / "a", toys.checkpoint_parts(), trained_on)
    base = open_base(str(toy_base(tmp_path / "base", hidden=15)))
    checkpoint = read_folder(folder)
    with pytest.raises(BaseModelError) as caught:
        bind(checkpoint, read_adapters(checkpoint, base), base)
    assert "tensors do not fit" in caught.value.problem
    assert f"SHA-256 {base.sha256}, trained on {'ab' * 32}" in caught.value.problem


def test_one_cause_is_said_once() -> None:
    """A base that was not given breaks every layer alike: one message, not one a layer."""

    def load(name: str) -> int:
        raise BaseModelError(f"{name}: no base", fix="Pass --base")

    with pytest.raises(BaseModelError) as caught:
        read_all("checkpoint", ["a", "b"], load)
    assert caught.value.problem == "a: no base"


def test_a_missing_number_comes_after_what_is_broken() -> None:
    """What no flag can mend is said first; else the missing number is asked for."""

    def load(name: str) -> str:
        if name == "broken":
            raise CheckpointError(f"{name}: misshapen")
        raise HyperparameterError(name, "alpha", "unknown", expected="a number", fix="Give it")

    with pytest.raises(HyperparameterError):
        read_all("checkpoint", ["whole"], load)
    with pytest.raises(CheckpointError, match="misshapen"):
        read_all("checkpoint", ["broken", "whole"], load)
    assert read_all("checkpoint", ["a", "b"], str.upper) == {"a": "A", "b": "B"}
