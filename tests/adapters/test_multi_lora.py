"""MultiLoRA: normal form and module against the paper's equation in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.adapters import multi_lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.multi_lora import MultiLoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor
from tests.checkpoint.messages import assert_whole

ALPHA = 5.0


def values(count: int = 3, rank: int = 2, inputs: int = 5, outputs: int = 7) -> dict[str, Array]:
    """Return one layer's tensors by role."""
    generator = np.random.default_rng(count * 10 + rank)
    return {
        "down": generator.normal(size=(count, rank, inputs)),
        "up": generator.normal(size=(count, outputs, rank)),
        "scaling_rows": generator.normal(size=(count, outputs)),
    }


def tensors(found: dict[str, Array], hyper: dict[str, float] | None = None) -> LayerTensors:
    """Return ``found`` as a checkpoint's layer."""
    stored = {role: memory_tensor(role, value) for role, value in found.items()}
    return LayerTensors("toy.dense", stored, {"alpha": ALPHA} if hyper is None else hyper)


def normal_form(layer: LayerTensors) -> LayerAdapter:
    """Return the layer's normal form."""
    return multi_lora.layer_adapter(layer, BaseLayer(layer.module, None))


def loop_delta(found: dict[str, Array]) -> Array:
    """Return (alpha / r) sum_i diag(c_i) B_i A_i, element by element."""
    down, up, rows = found["down"], found["up"], found["scaling_rows"]
    count, rank, inputs = down.shape
    result = np.zeros((up.shape[1], inputs))
    for o in range(up.shape[1]):
        for i in range(inputs):
            for n in range(count):
                dot = sum(float(up[n, o, q] * down[n, q, i]) for q in range(rank))
                result[o, i] += ALPHA / rank * rows[n, o] * dot
    return result


@given(
    count=st.integers(1, 4), rank=st.integers(1, 3),
    inputs=st.integers(1, 6), outputs=st.integers(1, 6),
)  # fmt: skip
def test_normal_form_is_the_equation(count: int, rank: int, inputs: int, outputs: int) -> None:
    """For any sizes; the scale divides by the rank of one LoRA, not of all."""
    found = values(count, rank, inputs, outputs)
    layer = normal_form(tensors(found))
    assert layer.task_count == 1
    np.testing.assert_allclose(layer.delta(0), loop_delta(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=["rows", "tokens", "4-D"])
def test_module_is_the_equation(shape: tuple[int, ...]) -> None:
    """The PyTorch layer gives base and delta together."""
    found = values()
    base = torch.nn.Linear(5, 7, dtype=torch.float64)
    module = MultiLoRALinear.from_tensors(base, TaskRouting(), tensors(found))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, *shape)))
    with torch.inference_mode():
        weight = base.weight.numpy() + loop_delta(found)
        expected = x.numpy() @ weight.T + base.bias.numpy()
        np.testing.assert_allclose(module(x).numpy(), expected, rtol=0, atol=1e-12)


def test_untrained_scalings_change_nothing() -> None:
    """The class starts with scalings of 0: the base as it was."""
    found = values()
    found["scaling_rows"] = np.zeros_like(found["scaling_rows"])
    assert not normal_form(tensors(found)).delta(0).any()


@pytest.mark.parametrize(
    "change",
    [{"scaling_rows": np.ones((3, 5))}, {"up": np.ones((3, 7, 3))}, {"up": np.ones((2, 7, 2))},
     {"down": np.ones((3, 5))}, {"extra": np.ones(1)}],
    ids=["row length", "rank", "count", "2-D", "unknown role"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Array]) -> None:
    """The shapes found and the equation's are both named."""
    with pytest.raises(CheckpointError) as caught:
        normal_form(tensors({**values(), **change}))
    assert_whole(caught.value, where="toy.dense", found="down [", expected="scaling_rows [n, O]")


def test_alpha_is_asked_for() -> None:
    """The flag to pass is named."""
    with pytest.raises(HyperparameterError, match="--alpha"):
        normal_form(tensors(values(), {}))
