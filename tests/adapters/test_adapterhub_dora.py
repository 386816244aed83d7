"""AdapterHub's DoRA: normal form and module against its equation, written in loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl_export.adapters import adapterhub_dora, dora
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.adapterhub_dora import AdapterHubDoRALinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor

SCALING = 1.7


def values(seed: int = 0, outputs: int = 7, inputs: int = 5, rank: int = 3) -> dict[str, Array]:
    """Return a base layer and an adapter, float64, nothing zero."""
    generator = np.random.default_rng(seed)
    return {
        "weight": generator.normal(size=(outputs, inputs)),
        "bias": generator.normal(size=outputs),
        "down": generator.normal(size=(rank, inputs)),
        "up": generator.normal(size=(outputs, rank)),
        "magnitude": generator.uniform(0.5, 2.0, outputs),
    }


def layer_of(v: dict[str, Array], *, scaling: float | None = SCALING) -> LayerTensors:
    """Return the adapter as a checkpoint's layer."""
    roles = {role: memory_tensor(role, v[role]) for role in ("down", "up", "magnitude")}
    return LayerTensors("toy", roles, {} if scaling is None else {"scaling": scaling})


def base_of(v: dict[str, Array], *, has_bias: bool = True) -> BaseLayer:
    """Return the base layer."""
    kinds = ("weight", "bias") if has_bias else ("weight",)
    tensors = {f"toy.{kind}": memory_tensor(f"toy.{kind}", v[kind]) for kind in kinds}
    return BaseLayer("toy", BaseModel("toy", Path("toy"), {}, tensors, ()))


def equation(v: dict[str, Array], x: Array, *, has_bias: bool = True) -> Array:
    """Return g . (W x + b + s B A x) with g = m / ||W + B A||, one output at a time."""
    result = []
    for o, row in enumerate(v["weight"]):
        product = [
            sum(v["up"][o, r] * v["down"][r, i] for r in range(len(v["down"])))
            for i in range(len(row))
        ]
        length = math.sqrt(sum((w + p) ** 2 for w, p in zip(row, product, strict=True)))
        y = sum((w + SCALING * p) * xi for w, p, xi in zip(row, product, x, strict=True))
        y += v["bias"][o] if has_bias else 0.0
        result.append(v["magnitude"][o] / length * y)
    return np.array(result)


def merged(adapter: LayerAdapter, v: dict[str, Array], x: Array, *, has_bias: bool = True) -> Array:
    """Return what the normal form computes."""
    assert adapter.gain is not None
    y = (adapter.gain[0][:, None] * (v["weight"] + adapter.delta(0))) @ x
    if adapter.bias is not None:
        return np.asarray(y + adapter.bias[0])
    return np.asarray(y + v["bias"] if has_bias else y)


@given(
    seed=st.integers(0, 99),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    rank=st.integers(1, 4),
    has_bias=st.booleans(),
)
def test_normal_form_and_module_are_the_equation(
    seed: int, outputs: int, inputs: int, rank: int, has_bias: bool
) -> None:
    """Both equal the loops in float64, whatever the sizes, with a bias and without."""
    v = values(seed, outputs, inputs, rank)
    x = np.random.default_rng(seed + 1).normal(size=inputs)
    expected = equation(v, x, has_bias=has_bias)
    adapter = adapterhub_dora.layer_adapter(layer_of(v), base_of(v, has_bias=has_bias))
    assert (adapter.bias is not None) == has_bias
    np.testing.assert_allclose(merged(adapter, v, x, has_bias=has_bias), expected, rtol=1e-9)
    linear = nn.Linear(inputs, outputs, bias=has_bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(v["weight"]))
        if has_bias:
            linear.bias.copy_(torch.from_numpy(v["bias"]))
        module = AdapterHubDoRALinear.from_tensors(linear, TaskRouting(), layer_of(v))
        found = module(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_it_is_not_the_papers_dora() -> None:
    """The norm without s and the bias under the gain are far from the paper's DoRA."""
    v, x = values(), np.random.default_rng(5).normal(size=5)
    expected = equation(v, x)
    paper = dora.layer_adapter(layer_of(v), base_of(v))
    assert np.abs(merged(paper, v, x) - expected).max() > 0.1


@pytest.mark.parametrize("fault", ["scale in the norm", "bias left alone", "scale dropped"])
def test_a_wrong_rule_is_seen(fault: str) -> None:
    """Each of the rules that other DoRA code follows moves the output."""
    v, x = values(), np.random.default_rng(5).normal(size=5)
    adapter = adapterhub_dora.layer_adapter(layer_of(v), base_of(v))
    if fault == "scale in the norm":
        gain = dora.layer_adapter(layer_of(v), base_of(v)).gain
        assert gain is not None
        wrong = replace(adapter, gain=gain, bias=gain * v["bias"])
    elif fault == "bias left alone":
        wrong = replace(adapter, bias=v["bias"][None])
    else:
        wrong = replace(adapter, core=adapter.core / SCALING)
    assert np.abs(merged(wrong, v, x) - equation(v, x)).max() > 0.05


def test_without_a_base_it_cannot_be_known() -> None:
    """The norm needs the base weight."""
    with pytest.raises(BaseModelError, match=r"toy.weight"):
        adapterhub_dora.layer_adapter(layer_of(values()), BaseLayer("toy", None))


def test_broken_layers_are_refused() -> None:
    """A missing magnitude, another base, a row without length, an unknown scale."""
    v = values()
    layer = layer_of(v)
    tensors = {role: t for role, t in layer.tensors.items() if role != "magnitude"}
    with pytest.raises(CheckpointError, match=r"magnitude \[O\]"):
        adapterhub_dora.layer_adapter(replace(layer, tensors=tensors), base_of(v))
    with pytest.raises(CheckpointError, match=r"the base weight is \[7, 4\]"):
        adapterhub_dora.layer_adapter(layer, base_of({**v, "weight": v["weight"][:, :4]}))
    gone = {**v, "weight": -(v["up"] @ v["down"])}
    with pytest.raises(CheckpointError, match=r"row 0 of W \+ B A is zero"):
        adapterhub_dora.layer_adapter(layer, base_of(gone))
    with pytest.raises(HyperparameterError, match="alpha"):
        adapterhub_dora.layer_adapter(layer_of(v, scaling=None), base_of(v))
