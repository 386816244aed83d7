"""Task-gated MoE-LoRA: normal form and module against the paper's equation in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.adapters import moe_lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.moe_lora import MoELoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor
from tests.checkpoint.messages import assert_whole

ALPHA = 5.0


def values(
    experts: int = 3, rank: int = 2, tasks: int = 4, inputs: int = 5, outputs: int = 7
) -> dict[str, Array]:
    """Return one layer's tensors by role."""
    generator = np.random.default_rng(experts * 100 + rank * 10 + tasks)
    return {
        "down": generator.normal(size=(experts, rank, inputs)),
        "up": generator.normal(size=(experts, outputs, rank)),
        "gate": generator.normal(size=(tasks, experts)),
    }


def tensors(found: dict[str, Array], hyper: dict[str, float] | None = None) -> LayerTensors:
    """Return ``found`` as a checkpoint's layer."""
    stored = {role: memory_tensor(role, value) for role, value in found.items()}
    return LayerTensors("toy.dense", stored, {"alpha": ALPHA} if hyper is None else hyper)


def normal_form(layer: LayerTensors) -> LayerAdapter:
    """Return the layer's normal form."""
    return moe_lora.layer_adapter(layer, BaseLayer(layer.module, None))


def loop_delta(found: dict[str, Array], task: int) -> Array:
    """Return (alpha / r) sum_i softmax(gate_t)_i B_i A_i, element by element."""
    down, up, gate = found["down"], found["up"], found["gate"][task]
    experts, rank, inputs = down.shape
    powers = [math.exp(float(logit)) for logit in gate]
    result = np.zeros((up.shape[1], inputs))
    for o in range(up.shape[1]):
        for i in range(inputs):
            for e in range(experts):
                dot = sum(float(up[e, o, q] * down[e, q, i]) for q in range(rank))
                result[o, i] += ALPHA / (experts * rank) * powers[e] / sum(powers) * dot
    return result


@given(
    experts=st.integers(1, 4), rank=st.integers(1, 3), tasks=st.integers(1, 4),
    inputs=st.integers(1, 6), outputs=st.integers(1, 6),
)  # fmt: skip
def test_normal_form_is_the_equation(
    experts: int, rank: int, tasks: int, inputs: int, outputs: int
) -> None:
    """For any sizes, one expert, one task or one feature included."""
    found = values(experts, rank, tasks, inputs, outputs)
    layer = normal_form(tensors(found))
    assert layer.task_count == tasks
    for task in range(tasks):
        np.testing.assert_allclose(layer.delta(task), loop_delta(found, task), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=["rows", "tokens", "4-D"])
def test_module_routes_each_row(shape: tuple[int, ...]) -> None:
    """Each row of a mixed batch is computed with its own task's gate."""
    found = values()
    routing = TaskRouting()
    base = torch.nn.Linear(5, 7, dtype=torch.float64)
    module = MoELoRALinear.from_tensors(base, routing, tensors(found))
    tasks = [3, 0, 2]
    routing.set(torch.tensor(tasks))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, *shape)))
    with torch.inference_mode():
        y = module(x).numpy()
        for row, task in enumerate(tasks):
            weight = base.weight.numpy() + loop_delta(found, task)
            expected = x[row].numpy() @ weight.T + base.bias.numpy()
            np.testing.assert_allclose(y[row], expected, rtol=0, atol=1e-12)


def test_scale_takes_the_rank_of_all_experts() -> None:
    """Alpha is divided by E q, not by q: a missing factor E would show."""
    found = values(experts=3)
    layer = normal_form(tensors({**found, "gate": np.zeros((1, 3))}))
    assert layer.core[0, 0, 0] == pytest.approx(ALPHA / 6 / 3)


def test_large_gate_logits_do_not_overflow() -> None:
    """A gate that is sure of one expert gives that expert alone."""
    found = values()
    found["gate"] = np.array([[0.0, 2000.0, 0.0]])
    only = ALPHA / 6 * found["up"][1] @ found["down"][1]
    np.testing.assert_allclose(normal_form(tensors(found)).delta(0), only, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [{"gate": np.ones((4, 2))}, {"up": np.ones((3, 7, 3))}, {"up": np.ones((2, 7, 2))},
     {"down": np.ones((3, 5))}, {"extra": np.ones(1)}, {"gate": np.ones((0, 3))}],
    ids=["gate width", "rank", "experts", "2-D", "unknown role", "no task"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Array]) -> None:
    """The shapes found and the equation's are both named."""
    with pytest.raises(CheckpointError) as caught:
        normal_form(tensors({**values(), **change}))
    assert_whole(caught.value, where="toy.dense", found="gate [", expected="gate [T, E]")


def test_alpha_is_asked_for() -> None:
    """The flag to pass is named."""
    with pytest.raises(HyperparameterError, match="--alpha"):
        normal_form(tensors(values(), {}))
