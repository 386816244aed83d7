"""(IA)^3: normal form and module against its equation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl_export.adapters import ia3
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.ia3 import IA3Linear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import BaseModelError, CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor


def layer_of(scale: Array, scaling: float | None = None) -> LayerTensors:
    """Return an adapter as a checkpoint's layer."""
    hyper = {} if scaling is None else {"scaling": scaling}
    return LayerTensors("toy", {"scale": memory_tensor("scale", scale)}, hyper)


def base_of(weight: Array, bias: Array | None) -> BaseLayer:
    """Return a base layer."""
    tensors = {"toy.weight": memory_tensor("toy.weight", weight)}
    if bias is not None:
        tensors["toy.bias"] = memory_tensor("toy.bias", bias)
    return BaseLayer("toy", BaseModel("toy", Path("toy"), {}, tensors, ()))


@given(
    seed=st.integers(0, 99),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    scaling=st.sampled_from([None, 1.0, 2.5]),
    has_bias=st.booleans(),
)
def test_normal_form_and_module_are_the_equation(
    seed: int, outputs: int, inputs: int, scaling: float | None, has_bias: bool
) -> None:
    """Both are s l . (W x + b) in float64, the bias rescaled too."""
    generator = np.random.default_rng(seed)
    weight, x = generator.normal(size=(outputs, inputs)), generator.normal(size=inputs)
    bias = generator.normal(size=outputs) if has_bias else None
    layer = layer_of(generator.normal(size=outputs), scaling)
    expected = np.array([
        (scaling or 1.0) * factor * (row @ x + (0.0 if bias is None else bias[o]))
        for o, (factor, row) in enumerate(
            zip(layer.tensors["scale"].numpy(), weight, strict=True)
        )
    ])  # fmt: skip
    adapter = ia3.layer_adapter(layer, base_of(weight, bias))
    assert adapter.gain is not None
    assert adapter.factors(0) is None
    assert (adapter.bias is not None) == has_bias
    found = (adapter.gain[0][:, None] * weight) @ x
    np.testing.assert_allclose(
        found if adapter.bias is None else found + adapter.bias[0], expected, atol=1e-12
    )
    linear = nn.Linear(inputs, outputs, bias=has_bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            linear.bias.copy_(torch.from_numpy(bias))
        module = IA3Linear.from_tensors(linear, TaskRouting(), layer)
        answer = module(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-12)


def test_broken_layers_are_refused() -> None:
    """No base, another width, an unknown role, a scale that is no number."""
    weight, scale = np.ones((3, 2)), np.ones(3)
    with pytest.raises(BaseModelError, match=r"toy.weight"):
        ia3.layer_adapter(layer_of(scale), BaseLayer("toy", None))
    with pytest.raises(CheckpointError, match=r"scale \[4\].*Expected scale \[3\]"):
        ia3.layer_adapter(layer_of(np.ones(4)), base_of(weight, None))
    stray = LayerTensors("toy", {"down": memory_tensor("down", scale)}, {})
    with pytest.raises(CheckpointError, match=r"down \[3\]"):
        ia3.layer_adapter(stray, base_of(weight, None))
    with pytest.raises(HyperparameterError, match="nan"):
        ia3.layer_adapter(layer_of(scale, float("nan")), base_of(weight, None))
