"""LoRA, DoRA, KaSA, PiSSA, OLoRA: normal form and module against the papers' equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.family import family_named
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.base_model import BaseModel
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, BaseModelError, CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor
from tests.checkpoint.messages import assert_whole

FAMILIES = ("lora", "dora", "kasa", "pissa", "olora")
EXTRA = {"dora": {"magnitude": "O"}, "kasa": {"diagonal": "r"}}
MODULE, SCALING = "toy.dense", 1.75


def values(family: str, rank: int, inputs: int, outputs: int) -> dict[str, Array]:
    """Return one layer's tensors by role."""
    generator = np.random.default_rng(rank * 100 + inputs * 10 + outputs)
    found = {
        "down": generator.normal(size=(rank, inputs)),
        "up": generator.normal(size=(outputs, rank)),
    }
    for role, length in EXTRA.get(family, {}).items():
        found[role] = generator.normal(size={"O": outputs, "r": rank}[length])
    return found


def tensors(
    found: Mapping[str, Array],
    hyper: Mapping[str, float] = MappingProxyType({"scaling": SCALING}),
    *,
    embedding: bool = False,
) -> LayerTensors:
    """Return ``found`` as a checkpoint's layer."""
    stored = {role: memory_tensor(role, value) for role, value in found.items()}
    return LayerTensors(MODULE, stored, hyper, embedding)


def base_of(stored: Array, bias: Array | None, model_type: str = "bert") -> BaseModel:
    """Return a base that holds the one layer, in memory."""
    named = {f"{MODULE}.weight": stored}
    if bias is not None:
        named[f"{MODULE}.bias"] = bias
    records = {name: memory_tensor(name, value) for name, value in named.items()}
    return BaseModel(
        "memory", Path("memory"), MappingProxyType({"model_type": model_type}), records, ()
    )


def normal_form(family: str, layer: LayerTensors, base: BaseModel | None) -> LayerAdapter:
    """Return the layer's normal form."""
    adapter = family_named(family).layer_adapter(layer, BaseLayer(MODULE, base, layer.embedding))
    assert isinstance(adapter, LayerAdapter)
    return adapter


def merged(adapter: LayerAdapter, weight: Array) -> Array:
    """Return diag(gain) (W + up core down)."""
    exact = weight + adapter.delta(0)
    return exact if adapter.gain is None else adapter.gain[0][:, None] * exact


def paper_weight(family: str, v: Mapping[str, Array], weight: Array) -> Array:
    """Return W' of the paper, in loops over rows and singular triplets."""
    rank = len(v["down"])
    product = np.zeros_like(weight)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            for j in range(rank):
                middle = v["diagonal"][j] if family == "kasa" else 1.0
                product[o, i] += v["up"][o, j] * middle * v["down"][j, i]
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    start = weight.copy()
    for j, value in enumerate(singular):
        gone = {"pissa": j < rank, "kasa": j >= len(singular) - rank}.get(family, False)
        if gone:
            start -= value * np.outer(left[:, j], right[j])
    if family == "olora":
        start -= SCALING * gram_schmidt_part(weight, rank)
    result = start + SCALING * product
    if family == "dora":
        for o, row in enumerate(result):
            result[o] = v["magnitude"][o] * row / np.sqrt(sum(float(x) ** 2 for x in row))
    return result


def gram_schmidt_part(weight: Array, rank: int) -> Array:
    """Return the projection of W on the span of its first r columns: Q_r R_r."""
    basis: list[Array] = []
    for column in weight.T[:rank]:
        rest = column - sum((b * (b @ column) for b in basis), np.zeros_like(column))
        basis.append(rest / np.linalg.norm(rest))
    return sum((np.outer(b, b @ weight) for b in basis), np.zeros_like(weight))


@pytest.mark.parametrize("family", FAMILIES)
@given(rank=st.integers(1, 3), inputs=st.integers(4, 7), outputs=st.integers(4, 7))
def test_normal_form_is_the_papers_weight(
    family: str, rank: int, inputs: int, outputs: int
) -> None:
    """Any sizes: the normal form's weight is the paper's, in float64."""
    v = values(family, rank, inputs, outputs)
    weight = np.random.default_rng(7).normal(size=(outputs, inputs))
    adapter = normal_form(family, tensors(v), base_of(weight, None))
    np.testing.assert_allclose(merged(adapter, weight), paper_weight(family, v, weight), atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_is_the_papers_weight(family: str) -> None:
    """The PyTorch module, which shares no code with the normal form, computes x W'^T + b."""
    v = values(family, 3, 5, 7)
    generator = np.random.default_rng(8)
    weight, bias, x = (generator.normal(size=s) for s in [(7, 5), (7,), (4, 2, 5)])
    module = oracle(family, tensors(v), linear(weight, bias))
    expected = x @ paper_weight(family, v, weight).T + bias
    np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("family", ["lora", "dora"])
def test_an_embedding_is_a_layer_of_one_hot_inputs(family: str) -> None:
    """Stored [V, O]: normal form and module agree with the transposed linear layer."""
    v = values(family, 2, 6, 4)  # six tokens, four dimensions
    stored = np.random.default_rng(9).normal(size=(6, 4))
    layer = tensors(v, embedding=True)
    expected = paper_weight(family, v, stored.T.copy()).T
    adapter = normal_form(family, layer, base_of(stored, None))
    np.testing.assert_allclose(merged(adapter, stored.T).T, expected, atol=1e-10)
    embedding = nn.Embedding(6, 4, _weight=torch.from_numpy(stored.copy()))
    ids = torch.tensor([[0, 5, 2], [2, 2, 1]])
    found = oracle(family, layer, embedding)(ids).numpy()
    np.testing.assert_allclose(found, expected[ids.numpy()], atol=1e-10)


def test_a_conv1d_is_read_transposed() -> None:
    """GPT-2 stores [I, O]; a square layer cannot be told by its shape, only by its class."""
    v = values("dora", 2, 5, 5)
    stored = np.random.default_rng(10).normal(size=(5, 5))
    adapter = normal_form(
        "dora",
        LayerTensors("h.0.attn.c_proj", tensors(v).tensors, {"scaling": SCALING}),
        BaseModel(
            "memory", Path("memory"), MappingProxyType({"model_type": "bert"}),
            {"toy.dense.weight": memory_tensor("w", stored)}, (),
        ),
    )  # fmt: skip
    plain = merged(adapter, stored)
    base = base_of(stored, None, "gpt2")
    renamed = {"h.0.attn.c_proj.weight": base.tensors[f"{MODULE}.weight"]}
    conv = BaseLayer(
        "h.0.attn.c_proj", BaseModel("memory", Path("memory"), base.config, renamed, ())
    )
    transposed = family_named("dora").layer_adapter(tensors(v), conv)
    assert isinstance(transposed, LayerAdapter)
    expected = paper_weight("dora", v, stored.T.copy())
    np.testing.assert_allclose(merged(transposed, stored.T), expected, atol=1e-10)
    assert np.abs(plain - expected.T).max() > 0.1


def test_a_trained_up_bias_is_scaled_and_added() -> None:
    """B' = b + s b_B, with the base's b or a trained one; module and normal form agree."""
    v = values("lora", 2, 5, 7)
    generator = np.random.default_rng(11)
    weight, base_bias = generator.normal(size=(7, 5)), generator.normal(size=7)
    v["up_bias"] = generator.normal(size=7)
    x = generator.normal(size=(3, 5))
    for own in (None, generator.normal(size=7)):
        found = v if own is None else {**v, "bias": own}
        expected = (base_bias if own is None else own) + SCALING * v["up_bias"]
        adapter = normal_form("lora", tensors(found), base_of(weight, base_bias))
        assert adapter.bias is not None
        np.testing.assert_allclose(adapter.bias[0], expected, atol=1e-12)
        y = oracle("lora", tensors(found), linear(weight, base_bias))(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(y, x @ merged(adapter, weight).T + expected, atol=1e-10)


def test_scaling_is_the_producers_or_alpha_over_r() -> None:
    """A known scaling wins; else alpha / r; neither is asked for by name."""
    v = values("lora", 2, 5, 7)
    for hyper, scale in (({"scaling": 3.0, "alpha": 1.0}, 3.0), ({"alpha": 1.0}, 0.5)):
        adapter = normal_form("lora", tensors(v, hyper), None)
        np.testing.assert_allclose(adapter.core[0], scale * np.eye(2))
    with pytest.raises(HyperparameterError) as caught:
        normal_form("lora", tensors(v, {"temperature": 1.0}), None)
    assert "--alpha" in caught.value.fix


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_families_that_need_the_base_ask_for_it(family: str) -> None:
    """Without a base, or with one of another shape, the layer is named."""
    layer = tensors(values(family, 2, 5, 7))
    with pytest.raises(BaseModelError) as caught:
        normal_form(family, layer, None)
    assert_whole(caught.value, where=f"{MODULE}.weight", found="no base model was given")
    with pytest.raises(BaseModelError) as caught:
        normal_form(family, layer, base_of(np.ones((5, 7)), None))
    assert_whole(caught.value, where=f"{MODULE}.weight", found="[5, 7]", expected="[7, 5]")


def test_olora_on_conv1d_is_refused() -> None:
    """PEFT decomposes the stored matrix, whose factors do not fit."""
    base = base_of(np.ones((5, 7)), None, "gpt2")
    conv = BaseLayer("h.0.attn.c_attn", base)
    with pytest.raises(AdapterError, match="OLoRA on a Conv1D"):
        family_named("olora").layer_adapter(tensors(values("olora", 2, 5, 7)), conv)


def test_a_row_without_a_direction_is_refused() -> None:
    """DoRA divides by each row's length; a zero row would be NaN."""
    v = values("dora", 2, 5, 7)
    v["up"][3] = 0.0
    weight = np.random.default_rng(12).normal(size=(7, 5))
    weight[3] = 0.0
    with pytest.raises(CheckpointError, match="row 3 of W"):
        normal_form("dora", tensors(v), base_of(weight, None))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["missing", "unknown", "rank", "length"])
def test_broken_layers_are_refused(family: str, fault: str) -> None:
    """A role that is missing, unknown or of another size is refused with all shapes."""
    v: dict[str, Any] = values(family, 2, 5, 7)
    if fault == "missing":
        del v["up"]
    elif fault == "unknown":
        v["lambda"] = np.ones((2, 2))
    elif fault == "rank":
        v["up"] = np.ones((7, 3))
    else:
        role = next(iter(EXTRA.get(family, {"down": ""})))
        v[role] = np.ones(4)
    with pytest.raises(CheckpointError) as caught:
        normal_form(family, tensors(v), base_of(np.ones((7, 5)), None))
    assert_whole(caught.value, where=MODULE, found="down", expected="up [O, r]")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("lora", lambda v: {**v, "down": v["down"][::-1]}),
        ("dora", lambda v: {**v, "magnitude": v["magnitude"][::-1]}),
        ("kasa", lambda v: {**v, "diagonal": v["diagonal"][::-1]}),
        ("kasa", lambda v: {**v, "diagonal": np.ones(3)}),
    ],
)
def test_a_misread_tensor_is_far_off(
    family: str, change: Callable[[dict[str, Array]], dict[str, Array]]
) -> None:
    """The comparison above would notice: rank swapped, magnitude permuted, diagonal lost."""
    v = values(family, 3, 5, 7)
    weight = np.random.default_rng(13).normal(size=(7, 5))
    wrong = normal_form(family, tensors(change(v)), base_of(weight, None))
    assert np.abs(merged(wrong, weight) - paper_weight(family, v, weight)).max() > 0.1


def linear(weight: Array, bias: Array) -> nn.Linear:
    """Return a float64 linear layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer.requires_grad_(False)


def oracle(family: str, layer: LayerTensors, base: nn.Module) -> nn.Module:
    """Return the family's module with the layer's values."""
    name, _, kind = family_named(family).oracle.partition(":")
    module: nn.Module = getattr(import_module(name), kind).from_tensors(base, TaskRouting(), layer)
    return module.requires_grad_(False)
