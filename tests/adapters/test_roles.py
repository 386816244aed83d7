"""One check of roles and shapes: letters mean one size everywhere, and errors name all of it."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_export.adapters.roles import checked_values
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.errors import CheckpointError
from tests.adapters.toys import memory_tensor

REQUIRED = {"down": "n + 1, r, I", "gate": "n, 4 or n"}


def layer_of(**shapes: tuple[int, ...]) -> LayerTensors:
    """Return a layer with zeros of these shapes."""
    stored = {role: memory_tensor(role, np.zeros(shape)) for role, shape in shapes.items()}
    return LayerTensors("toy.dense", stored, {})


@pytest.mark.parametrize("gate", [(2, 4), (2,)])
def test_shapes_that_agree_are_read(gate: tuple[int, ...]) -> None:
    """Every role is there, in either of the shapes it may have."""
    values = checked_values(layer_of(down=(3, 2, 5), gate=gate), REQUIRED, {"scaler": ""})
    assert values["down"].shape == (3, 2, 5)
    assert values["gate"].shape == gate


@pytest.mark.parametrize(
    "shapes",
    [
        {"down": (3, 2, 5)},
        {"down": (3, 2, 5), "gate": (3,)},
        {"down": (3, 2, 5), "gate": (2, 5)},
        {"down": (3, 2), "gate": (2,)},
        {"down": (1, 2, 5), "gate": (0,)},
        {"down": (3, 0, 5), "gate": (2,)},
        {"down": (3, 2, 5), "gate": (2,), "scaler": (1,)},
        {"down": (3, 2, 5), "gate": (2,), "other": ()},
    ],
)
def test_shapes_that_do_not_agree_are_all_named(shapes: dict[str, tuple[int, ...]]) -> None:
    """Missing, unknown, empty and misshapen tensors are refused, with what was wanted."""
    with pytest.raises(CheckpointError) as caught:
        checked_values(layer_of(**shapes), REQUIRED, {"scaler": ""})
    for role, shape in shapes.items():
        assert f"{role} {list(shape)}" in caught.value.problem
    assert caught.value.expected == "down [n + 1, r, I], gate [n, 4] or [n], and maybe scaler []"
