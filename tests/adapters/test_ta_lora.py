from __future__ import annotations

import doctest
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl_export.adapters import ta_lora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.modules.ta_lora import TALoRALinear
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import CheckpointError, HyperparameterError
from tests.adapters import toys

ALPHA = 5.0


def layer_values(
    seed: int = 0,
    *,
    rank: int = 3,
    branches: int = 2,
    tasks: int = 3,
    inputs: int = 5,
    outputs: int = 7,
    width: int = 4,
    bias: bool = True,
    dtype: str = "F64",
) -> dict[str, Array]:
    """Return one layer's tensors by role, every value at least 0.05 away from zero."""
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        signs = generator.choice([-1.0, 1.0], shape)
        return np.asarray(signs * generator.uniform(0.05, 0.9, shape)).astype(NUMPY_DTYPES[dtype])

    values = {
        "down": draw(branches + 1, rank, inputs),
        "up": draw(branches + 1, outputs, rank),
        "task_embedding": draw(tasks, width),
        "gate": draw(branches, width),
    }
    return values | ({"gate_bias": draw(branches)} if bias else {})


def layer_tensors(
    values: Mapping[str, Array], *, softmax: bool = False, alpha: float = ALPHA
) -> LayerTensors:
    """Return ``values`` as a checkpoint's layer, held in memory."""
    layer = toys.layer_tensors(values)
    return replace(layer, hyper={"alpha": alpha, "gate_softmax": float(softmax)})


def normal_form(layer: LayerTensors) -> LayerAdapter:
    """Return the layer's normal form."""
    return ta_lora.layer_adapter(layer, BaseLayer(layer.module, None))


def paper_delta(values: Mapping[str, Array], task: int, *, softmax: bool, alpha: float) -> Array:
    """Return s (B_0 A_0 + sum g_i B_i A_i), the gates written with plain numbers."""
    down, up = values["down"].astype(float), values["up"].astype(float)
    embedding = [float(value) for value in values["task_embedding"][task]]
    logits = [
        sum(float(g) * e for g, e in zip(row, embedding, strict=True))
        + (float(values["gate_bias"][i]) if "gate_bias" in values else 0.0)
        for i, row in enumerate(values["gate"])
    ]
    if softmax:
        total = sum(math.exp(z - max(logits)) for z in logits)
        gates = [math.exp(z - max(logits)) / total for z in logits]
    else:
        gates = [1.0 / (1.0 + math.exp(-z)) for z in logits]
    delta = up[0] @ down[0]
    for i, gate in enumerate(gates, start=1):
        delta = delta + gate * (up[i] @ down[i])
    return np.asarray(alpha / down.shape[1] * delta)


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 4),
    branches=st.integers(1, 4),
    tasks=st.integers(1, 4),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    width=st.integers(1, 5),
    bias=st.booleans(),
    softmax=st.booleans(),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
def test_normal_form_and_module_are_the_papers_equation(
    seed: int,
    rank: int,
    branches: int,
    tasks: int,
    inputs: int,
    outputs: int,
    width: int,
    bias: bool,
    softmax: bool,
    dtype: str,
) -> None:
    """Any size, gate and stored dtype: the folded delta and the forward pass equal the sum."""
    values = layer_values(
        seed, rank=rank, branches=branches, tasks=tasks, inputs=inputs, outputs=outputs,
        width=width, bias=bias, dtype=dtype,
    )  # fmt: skip
    layer = layer_tensors(values, softmax=softmax)
    adapter = normal_form(layer)
    task_ids = np.arange(tasks)[::-1].copy()
    module = module_of(layer, task_ids)
    x = np.random.default_rng(seed).normal(size=(tasks, 2, inputs))
    h = forward(module, x)
    weight, base_bias = (p.detach().numpy() for p in (module.base.weight, module.base.bias))
    for row, task in enumerate(task_ids):
        expected = paper_delta(values, task, softmax=softmax, alpha=ALPHA)
        np.testing.assert_allclose(adapter.delta(task), expected, rtol=1e-10, atol=1e-12)
        by_hand = x[row] @ (weight + expected).T + base_bias
        np.testing.assert_allclose(h[row], by_hand, rtol=1e-10, atol=1e-11)


def module_of(layer: LayerTensors, task_ids: Array) -> TALoRALinear:
    """Return the layer on a seeded float64 base, routed by ``task_ids``."""
    _, outputs, _ = layer.tensors["up"].shape
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(layer.tensors["down"].shape[2], outputs, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(torch.randn(base.weight.shape, generator=generator))
        base.bias.copy_(torch.randn(base.bias.shape, generator=generator))
    routing = TaskRouting()
    routing.set(torch.from_numpy(task_ids))
    return TALoRALinear.from_tensors(base, routing, layer)


def forward(module: TALoRALinear, x: Array) -> Array:
    """Return the layer's output as numpy."""
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(x)))


def test_the_worked_example_holds() -> None:
    """The module's docstring computes what it shows."""
    assert doctest.testmod(ta_lora) == (0, 4)


FAULTS: dict[str, Callable[[dict[str, Array]], dict[str, Array]]] = {
    "tasks permuted": lambda v: v | {"task_embedding": v["task_embedding"][[1, 2, 0]]},
    "branches permuted": lambda v: v | {"gate": v["gate"][::-1]},
    "up-projections averaged": lambda v: v | {
        "up": np.broadcast_to(v["up"].mean(axis=0), v["up"].shape)
    },
    "shared branch dropped": lambda v: v | {
        "up": np.concatenate([0 * v["up"][:1], v["up"][1:]])
    },
    "shared branch gated": lambda v: v | {"down": v["down"][[1, 0, 2]], "up": v["up"][[1, 0, 2]]},
    "bias dropped": lambda v: {role: value for role, value in v.items() if role != "gate_bias"},
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_seen(fault: str) -> None:
    """Each plausible mistake moves the delta by far more than the tolerance."""
    values = layer_values(4)
    expected = paper_delta(values, 1, softmax=False, alpha=ALPHA)
    found = normal_form(layer_tensors(FAULTS[fault](values))).delta(1)
    assert np.abs(found - expected).max() > 1e-3


@pytest.mark.parametrize(
    "changed", [{"softmax": True}, {"alpha": 2 * ALPHA}], ids=["other gate", "scale"]
)
def test_numbers_matter(changed: dict[str, float]) -> None:
    """The kind of gate and alpha change the delta."""
    values = layer_values(4)
    first = normal_form(layer_tensors(values)).delta(1)
    second = normal_form(layer_tensors(values, **changed)).delta(1)  # type: ignore[arg-type]
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("softmax", [False, True])
def test_gates_do_not_overflow(softmax: bool) -> None:
    """Logits beyond exp's range give gates of 0 and 1."""
    values = layer_values(4, bias=False)
    values["gate"] = np.array([[1e4, 0, 0, 0], [-1e4, 0, 0, 0]])
    values["task_embedding"][:, 0] = 1.0
    weights = ta_lora.gates(values["task_embedding"], values["gate"], None, is_softmax=softmax)
    np.testing.assert_array_equal(weights, np.broadcast_to([1.0, 0.0], (3, 2)))


@pytest.mark.parametrize("value", [None, 0.5, -1.0])
def test_the_gate_must_be_known(value: float | None) -> None:
    """Which gate was trained is never guessed."""
    layer = layer_tensors(layer_values())
    hyper = {"alpha": 1.0} | ({} if value is None else {"gate_softmax": value})
    with pytest.raises(HyperparameterError) as caught:
        normal_form(replace(layer, hyper=hyper))
    assert caught.value.problem.startswith("toy.dense: gate_softmax")
    assert "softmax" in caught.value.expected


def test_alpha_is_asked_for() -> None:
    """Without alpha or s the option is named."""
    layer = replace(layer_tensors(layer_values()), hyper={"gate_softmax": 0.0})
    with pytest.raises(HyperparameterError, match="--alpha"):
        normal_form(layer)


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("down", (3, 3)),
        ("down", (2, 3, 5)),
        ("up", (3, 3, 7)),
        ("gate", (3, 4)),
        ("gate", (2, 5)),
        ("gate_bias", (3,)),
        ("task_embedding", (4,)),
        ("task_embedding", (0, 4)),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(role: str, shape: tuple[int, ...]) -> None:
    """One misshapen tensor is refused with all shapes of the layer."""
    with pytest.raises(CheckpointError) as caught:
        normal_form(layer_tensors(layer_values() | {role: np.ones(shape)}))
    assert f"{role} {list(shape)}" in caught.value.problem
    assert "down [n + 1, r, I]" in caught.value.expected


@pytest.mark.parametrize("role", ["task_embedding", "gate", "down", "up"])
def test_missing_roles_are_refused(role: str) -> None:
    """A layer has all of TA-LoRA's tensors."""
    values = layer_values()
    del values[role]
    with pytest.raises(CheckpointError, match="task_embedding"):
        normal_form(layer_tensors(values))


def test_tensors_give_back_what_was_loaded() -> None:
    """What from_tensors reads, tensors() and hyper() return."""
    values = layer_values()
    module = module_of(layer_tensors(values, softmax=True), np.array([0]))
    assert module.hyper() == {"alpha": ALPHA, "gate_softmax": 1.0}
    found = module.tensors()
    assert found.keys() == values.keys()
    for role, value in values.items():
        np.testing.assert_array_equal(found[role].numpy(), value)


def test_a_shared_embedding_is_trained_by_every_layer() -> None:
    """Layers built on one e_t train that one parameter; the base stays frozen."""
    torch.manual_seed(0)
    embedding, routing = nn.Parameter(torch.randn(3, 4)), TaskRouting()
    routing.set(torch.tensor([2, 0]))
    layers = [
        TALoRALinear(
            nn.Linear(5, 5), routing, task_embedding=embedding, rank=2, branches=2, alpha=2.0
        )
        for _ in range(2)
    ]
    layers[1](layers[0](torch.ones(2, 5))).square().sum().backward()
    assert layers[0].task_embedding is layers[1].task_embedding
    assert embedding.grad is not None
    assert (embedding.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True]
    for layer in layers:
        assert layer.base.weight.grad is None
        for name, parameter in layer.named_parameters(recurse=False):
            assert parameter.grad is not None, name


def test_a_fresh_layer_starts_near_the_base() -> None:
    """Training starts close to the base, with branches that can grow apart."""
    torch.manual_seed(0)
    base, routing = nn.Linear(5, 7), TaskRouting()
    routing.set(torch.tensor([0, 1]))
    module = TALoRALinear(
        base, routing, task_embedding=nn.Parameter(torch.randn(2, 3)), rank=3, branches=2,
        alpha=3.0, gate="softmax", gate_bias=False,
    )  # fmt: skip
    x = torch.ones(2, 5)
    with torch.inference_mode():
        moved = (module(x) - base(x)).abs().max()
    assert 0 < moved < 0.2
    assert not torch.equal(module.up[0], module.up[1])
    assert "gate_bias" not in module.tensors()
