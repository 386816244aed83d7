from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mtl_export.adapters.modules.mtl_lora import MTLLoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.tensors import Array
from tests.adapters import toys


def module_of(
    values: dict[str, Array], task_ids: Array, dtype: torch.dtype = torch.float64
) -> MTLLoRALinear:
    """Return the layer on a seeded base, routed by ``task_ids``."""
    outputs, inputs = values["up"].shape[1], values["down"].shape[1]
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(inputs, outputs, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(torch.randn(base.weight.shape, generator=generator))
        base.bias.copy_(torch.randn(base.bias.shape, generator=generator))
    routing = TaskRouting()
    routing.set(torch.from_numpy(task_ids))
    return MTLLoRALinear.from_tensors(base, routing, toys.layer_tensors(values))


def forward(module: MTLLoRALinear, x: Array) -> Array:
    """Return the layer's output as numpy."""
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(x)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "learnt scale"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_forward_is_the_papers_equation(
    diagonal: bool, scaler: bool, shape: tuple[int, ...]
) -> None:
    """A mixed batch through the module equals the paper's sum written in loops."""
    values = toys.layer_values(3, diagonal=diagonal, scaler=scaler)
    task_ids = np.array([1, 2, 0, 1])
    module = module_of(values, task_ids)
    x = np.random.default_rng(0).normal(size=shape)
    weight, bias = (p.detach().numpy() for p in (module.base.weight, module.base.bias))
    expected = toys.paper_rows(values, weight, bias, x, task_ids)
    np.testing.assert_allclose(forward(module, x), expected, rtol=1e-11, atol=1e-11)


def test_tensors_give_back_what_was_loaded() -> None:
    """What from_tensors reads, tensors() returns, role by role."""
    values = toys.layer_values(3, scaler=True)
    found = module_of(values, np.array([0])).tensors()
    assert found.keys() == values.keys()
    for role, value in values.items():
        np.testing.assert_array_equal(found[role].numpy(), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_at_a_low_temperature(dtype: torch.dtype) -> None:
    """The module mixes in half precision at tau 0.05 without overflow."""
    values = toys.layer_values(3, dtype="F32")
    values["mixing"] *= 1000
    layer = toys.layer_tensors(values, temperature=0.05)
    routing = TaskRouting()
    routing.set(torch.tensor([2, 0]))
    module = MTLLoRALinear.from_tensors(nn.Linear(5, 7, dtype=dtype), routing, layer)
    with torch.inference_mode():
        assert torch.isfinite(module(torch.ones(2, 5, dtype=dtype))).all()


def test_only_the_adapter_is_trained() -> None:
    """The base is frozen; every tensor of the adapter gets a gradient."""
    module = module_of(toys.layer_values(3, scaler=True), np.array([0, 1, 2]))
    module(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
    assert module.base.weight.grad is None
    for role, value in module.tensors().items():
        parameter = module.get_parameter("lambdas" if role == "lambda" else role)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, role
        assert value.shape == parameter.shape


def test_tasks_do_not_touch_each_other() -> None:
    """Changing one task's Lambda and mixing leaves other tasks' rows bit-identical."""
    values = toys.layer_values(3)
    changed = {role: value.copy() for role, value in values.items()}
    changed["lambda"][1] += 1
    changed["mixing"][1] += [1, -1]
    x = np.random.default_rng(0).normal(size=(3, 5))
    task_ids = np.array([0, 1, 2])
    before, after = (forward(module_of(v, task_ids), x) for v in (values, changed))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.abs(before[1] - after[1]).min() > 0


def test_a_fresh_layer_starts_near_the_base_with_different_up_projections() -> None:
    """Training starts close to the base, with B_i that can grow apart."""
    torch.manual_seed(0)
    base, routing = nn.Linear(5, 7), TaskRouting()
    routing.set(torch.tensor([0, 1]))
    module = MTLLoRALinear(
        base, routing, tasks=2, rank=3, up_projections=2, alpha=3.0, temperature=0.5,
        lambda_format="diagonal", learn_scale=True,
    )  # fmt: skip
    x = torch.ones(2, 5)
    with torch.inference_mode():
        moved = (module(x) - base(x)).abs().max()
    assert 0 < moved < 0.2
    assert not torch.equal(module.up[0], module.up[1])
    assert module.lambdas.shape == (2, 3)
