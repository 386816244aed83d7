"""MTL-LoRA on a fused projection: blocks placed, mixed and scaled as its authors' code does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.adapters import mtl_lora_fused
from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.modules.mtl_lora_fused import MTLLoRAFusedLinear
from mtl_export.adapters.modules.routing import TaskRouting
from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError, HyperparameterError
from tests.adapters.toys import memory_tensor
from tests.checkpoint.messages import assert_whole

ALPHA, TEMPERATURE = 5.0, 0.4
HYPER = {"alpha": ALPHA, "temperature": TEMPERATURE}


def values(
    letters: str = "qkv",
    mixed: str = "qkv",
    *,
    rank: int = 2,
    tasks: int = 4,
    head: int = 3,
    inputs: int = 5,
    diagonal: bool = False,
    scaler: bool = False,
) -> dict[str, Array]:
    """Return one layer's tensors by role; a letter outside ``mixed`` has one B for all."""
    generator = np.random.default_rng(rank * 100 + tasks * 10 + len(letters))
    width = rank * len(letters)
    found = {
        "down": generator.normal(size=(width, inputs)),
        "lambda": generator.normal(size=(tasks, width) if diagonal else (tasks, width, width)),
    }
    for letter in letters:
        found[f"up_{letter}"] = generator.normal(size=(3 if letter in mixed else 1, head, rank))
        if letter in mixed:
            found[f"mixing_{letter}"] = generator.normal(size=(tasks, 3))
    return found | ({"scaler": np.array(0.7)} if scaler else {})


def tensors(found: dict[str, Array], hyper: dict[str, float] = HYPER) -> LayerTensors:
    """Return ``found`` as a checkpoint's layer."""
    stored = {role: memory_tensor(role, value) for role, value in found.items()}
    return LayerTensors("toy.c_attn", stored, hyper)


def normal_form(layer: LayerTensors) -> LayerAdapter:
    """Return the layer's normal form; without a base it ends with its last adapted block."""
    return mtl_lora_fused.layer_adapter(layer, BaseLayer(layer.module, None))


def loop_delta(found: dict[str, Array], task: int) -> Array:
    """Return the delta element by element, for as many blocks as the letters need."""
    letters = [letter for letter in "qkv" if f"up_{letter}" in found]
    _, head, rank = found[f"up_{letters[0]}"].shape
    lambdas = found["lambda"][task]
    lambdas = np.diag(lambdas) if lambdas.ndim == 1 else lambdas
    scale = ALPHA / rank
    if "scaler" in found:
        scale *= 1 / (1 + math.exp(-float(found["scaler"])))
    result = np.zeros((head * ("qkv".index(letters[-1]) + 1), found["down"].shape[1]))
    for position, letter in enumerate(letters):
        powers = [1.0]
        if f"mixing_{letter}" in found:
            powers = [math.exp(float(w) / TEMPERATURE) for w in found[f"mixing_{letter}"][task]]
        for o in range(head):
            for i in range(result.shape[1]):
                for power, up in zip(powers, found[f"up_{letter}"], strict=True):
                    for q in range(rank):
                        row = lambdas[position * rank + q]
                        inner = sum(float(row[d] * found["down"][d, i]) for d in range(len(row)))
                        share = scale * power / sum(powers)
                        result["qkv".index(letter) * head + o, i] += share * up[o, q] * inner
    return result


@given(
    letters=st.sampled_from(["q", "k", "v", "qk", "qv", "kv", "qkv"]),
    mixed=st.sampled_from(["", "q", "qv", "qkv"]),
    rank=st.integers(1, 3), tasks=st.integers(1, 3), head=st.integers(1, 4),
    inputs=st.integers(1, 5), diagonal=st.booleans(), scaler=st.booleans(),
)  # fmt: skip
def test_normal_form_is_the_equation(
    letters: str, mixed: str, rank: int, tasks: int, head: int, inputs: int, diagonal: bool,
    scaler: bool,
) -> None:  # fmt: skip
    """For any blocks enabled, any of them with a B of its own per task."""
    found = values(letters, mixed, rank=rank, tasks=tasks, head=head, inputs=inputs,
                   diagonal=diagonal, scaler=scaler)  # fmt: skip
    layer = normal_form(tensors(found))
    for task in range(tasks):
        np.testing.assert_allclose(layer.delta(task), loop_delta(found, task), rtol=0, atol=1e-11)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("letters", ["qkv", "qv", "k"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)], ids=["rows", "tokens", "4-D"])
def test_module_routes_each_row(letters: str, diagonal: bool, shape: tuple[int, ...]) -> None:
    """Each row of a mixed batch gets its task's delta in the enabled blocks, none elsewhere."""
    found = values(letters, "qk", diagonal=diagonal, scaler=True)
    routing = TaskRouting()
    base = torch.nn.Linear(5, 9, dtype=torch.float64)
    module = MTLLoRAFusedLinear.from_tensors(base, routing, tensors(found))
    tasks = [3, 0, 2]
    routing.set(torch.tensor(tasks))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, *shape)))
    with torch.inference_mode():
        y = module(x).numpy()
        for row, task in enumerate(tasks):
            weight = base.weight.numpy().copy()
            delta = loop_delta(found, task)
            weight[: len(delta)] += delta
            expected = x[row].numpy() @ weight.T + base.bias.numpy()
            np.testing.assert_allclose(y[row], expected, rtol=0, atol=1e-12)


def test_full_lambda_mixes_the_blocks() -> None:
    """Zeroing the part of Lambda between blocks changes the delta: they are not separate."""
    found = values()
    split = np.kron(np.eye(3), np.ones((2, 2)))
    parted = {**found, "lambda": found["lambda"] * split}
    assert np.abs(loop_delta(found, 0) - loop_delta(parted, 0)).max() > 1e-2
    first, second = (normal_form(tensors(v)).delta(0) for v in (found, parted))
    assert np.abs(first - second).max() > 1e-2


def test_only_mixed_blocks_need_a_temperature() -> None:
    """One B per block for all tasks needs alpha alone; a mixed one names the flag."""
    plain = values("qv", "")
    assert normal_form(tensors(plain, {"alpha": ALPHA})).task_count == 4
    for hyper, flag in [({"alpha": ALPHA}, "--temperature"), ({"temperature": 1.0}, "--alpha")]:
        with pytest.raises(HyperparameterError, match=flag):
            normal_form(tensors(values(), hyper))


@pytest.mark.parametrize(
    "change",
    [{"lambda": np.ones((4, 6, 5))}, {"down": np.ones((4, 5))}, {"up_k": np.ones((3, 3, 1))},
     {"mixing_q": np.ones((3, 3))}, {"scaler": np.ones(1)}, {"up": np.ones((1, 3, 2))}],
    ids=["Lambda", "rank", "ranks differ", "task counts", "scaler", "unknown role"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Array]) -> None:
    """The shapes found and the equation's are both named."""
    with pytest.raises(CheckpointError) as caught:
        normal_form(tensors({**values(), **change}))
    assert_whole(caught.value, where="toy.c_attn", found="down [", expected="down [g r, I]")


def test_several_b_without_mixing_weights_are_refused() -> None:
    """Nothing says how to mix them, so they are not averaged."""
    found = values()
    del found["mixing_k"]
    with pytest.raises(CheckpointError, match="up \\[1, h, r\\] alone"):
        normal_form(tensors(found))
