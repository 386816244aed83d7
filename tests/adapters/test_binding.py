from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_export.adapters.binding import BoundModel, bind
from mtl_export.adapters.family import read_adapters
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import BaseReference, Checkpoint
from mtl_export.checkpoint.formats.own_folder import read_folder
from mtl_export.errors import BaseModelError, IntegrityError
from tests.adapters import toys


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Return the toy checkpoint, which names no base hash."""
    reference = BaseReference("toy/bert", "")
    parts = toys.checkpoint_parts()
    return read_folder(toys.write_checkpoint(tmp_path / "adapter", parts, reference))


def base_of(tmp_path: Path, shapes: Mapping[str, tuple[int, ...]]) -> BaseModel:
    """Return a base that holds tensors of these shapes in memory."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"the weights")
    tensors = {n: toys.memory_tensor(n, np.ones(s, np.float32)) for n, s in shapes.items()}
    return BaseModel("./base", tmp_path, {}, tensors, (file,))


def shapes_without(prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the adapted weights' shapes, their names without ``prefix``."""
    return {f"{m.removeprefix(prefix)}.weight": s for m, s in toys.MODULES.items()}


def bound_to(checkpoint: Checkpoint, base: BaseModel) -> BoundModel:
    """Bind ``checkpoint`` to ``base``."""
    return bind(checkpoint, read_adapters(checkpoint), base)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_the_prefix_between_base_and_class_is_found(
    checkpoint: Checkpoint, tmp_path: Path, prefix: str
) -> None:
    """A bare base and a full model both bind, and tensors are found by the class's name."""
    bound = bound_to(checkpoint, base_of(tmp_path, shapes_without(prefix)))
    assert bound.prefix == prefix
    name = "bert.pooler.dense.weight"
    assert bound.base_tensor(name).name == name.removeprefix(prefix)


def test_all_layers_that_do_not_fit_are_listed_at_once(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A missing layer and a transposed one appear in one message with both shapes."""
    shapes = shapes_without("bert.")
    del shapes["pooler.dense.weight"]
    wrong = "encoder.layer.0.intermediate.dense.weight"
    shapes[wrong] = shapes[wrong][::-1]
    with pytest.raises(BaseModelError) as caught:
        bound_to(checkpoint, base_of(tmp_path, shapes))
    assert caught.value.problem.startswith("base ./base")
    assert "2 tensors do not fit" in caught.value.problem
    assert "'pooler.dense.weight' is missing" in caught.value.problem
    assert f"'{wrong}' is [12, 20], the adapter needs [20, 12]" in caught.value.problem
    assert caught.value.expected == "the base that the adapter was trained on"
    assert "--base" in caught.value.fix
    assert "toy/bert" in caught.value.fix


def test_another_base_of_the_same_shapes_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A base whose SHA-256 is not the checkpoint's is an integrity error with both hashes."""
    base = base_of(tmp_path, shapes_without("bert."))
    other = replace(checkpoint, base=BaseReference("toy/bert", "0" * 64))
    with pytest.raises(IntegrityError) as caught:
        bound_to(other, base)
    assert base.sha256 in caught.value.problem
    assert caught.value.expected == "0" * 64
    assert "--base" in caught.value.fix


def test_the_base_that_the_checkpoint_names_is_accepted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The right hash binds; so does a checkpoint that names none."""
    base = base_of(tmp_path, shapes_without("bert."))
    same = replace(checkpoint, base=BaseReference("", base.sha256))
    assert bound_to(same, base).base is base
    assert bound_to(checkpoint, base).base is base
