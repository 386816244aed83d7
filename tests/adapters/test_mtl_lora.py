from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.adapters import mtl_lora
from mtl_export.adapters.mtl_lora import softmax, task_cores
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import CheckpointError, HyperparameterError
from tests.adapters import toys


def normal_form_rows(
    layer: LayerTensors, weight: Array, bias: Array, x: Array, task_ids: Array
) -> Array:
    """Return every row's output by the normal form: ``x (W + up core_t down)^T + b``."""
    adapter = toys.normal_form(layer)
    return np.stack(
        [
            row @ (weight + adapter.delta(int(task))).T + bias
            for row, task in zip(x, task_ids, strict=True)
        ]
    )


def assert_normal_form_is_paper(values: dict[str, Array], x: Array, task_ids: Array) -> None:
    """Compare both for one layer with a seeded base weight."""
    outputs, inputs = values["up"].shape[1], values["down"].shape[1]
    generator = np.random.default_rng(2)
    weight, bias = generator.normal(size=(outputs, inputs)), generator.normal(size=outputs)
    expected = toys.paper_rows(values, weight, bias, x, task_ids)
    found = normal_form_rows(toys.layer_tensors(values), weight, bias, x, task_ids)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)], ids=["rows", "tokens"])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "learnt scale"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_normal_form_is_the_papers_equation(
    diagonal: bool, scaler: bool, shape: tuple[int, ...]
) -> None:
    """A mixed batch through the normal form equals the paper's sum written in loops."""
    values = toys.layer_values(1, diagonal=diagonal, scaler=scaler)
    x = np.random.default_rng(0).normal(size=shape)
    assert_normal_form_is_paper(values, x, np.array([2, 0, 1, 2]))


@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 5),
    ups=st.integers(1, 4),
    tasks=st.integers(1, 4),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    diagonal=st.booleans(),
    scaler=st.booleans(),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
def test_normal_form_holds_for_every_size_and_dtype(
    seed: int,
    rank: int,
    ups: int,
    tasks: int,
    inputs: int,
    outputs: int,
    diagonal: bool,
    scaler: bool,
    dtype: str,
) -> None:
    """Any rank, count of B_i, tasks, sizes and stored dtype give the paper's output."""
    values = toys.layer_values(
        seed, rank=rank, ups=ups, tasks=tasks, inputs=inputs, outputs=outputs,
        diagonal=diagonal, scaler=scaler, dtype=dtype,
    )  # fmt: skip
    x = np.random.default_rng(seed).normal(size=(tasks, inputs))
    assert_normal_form_is_paper(values, x, np.arange(tasks)[::-1])


def test_factors_are_laid_out_as_documented() -> None:
    """Up is [B_1 ... B_n] side by side, down is A untouched, core stacks p_ti Lambda_t."""
    values = toys.layer_values(4, scaler=True)
    adapter = toys.normal_form(toys.layer_tensors(values))
    np.testing.assert_array_equal(adapter.up, np.concatenate(list(values["up"]), axis=1))
    np.testing.assert_array_equal(adapter.down, values["down"])
    p = np.exp(values["mixing"] / toys.TEMPERATURE)
    p /= p.sum(axis=1, keepdims=True)
    c = 1 / (1 + np.exp(-values["scaler"]))
    expected = [
        toys.ALPHA / toys.RANK * c * np.concatenate([p[t, i] * values["lambda"][t] for i in (0, 1)])
        for t in range(3)
    ]
    np.testing.assert_allclose(adapter.core, np.stack(expected), rtol=1e-13)


@pytest.mark.parametrize("role", ["down", "lambda", "up", "mixing", "scaler"])
def test_every_tensor_matters(role: str) -> None:
    """Changing any one tensor changes the delta."""
    values = toys.layer_values(6, scaler=True)
    changed = values | {role: np.asarray(values[role] + np.arange(values[role].size).reshape(
        values[role].shape) + 0.5)}  # fmt: skip
    first, second = (toys.normal_form(toys.layer_tensors(v)).delta(1) for v in (values, changed))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("alpha", 2 * toys.ALPHA), ("temperature", 0.6)])
def test_every_hyperparameter_matters(name: str, value: float) -> None:
    """Changing alpha or the temperature changes the delta."""
    values = toys.layer_values(6)
    first = toys.normal_form(toys.layer_tensors(values)).delta(1)
    layer = toys.layer_tensors(values)
    second = toys.normal_form(replace(layer, hyper={**layer.hyper, name: value})).delta(1)
    assert np.abs(first - second).max() > 1e-3


def test_doubling_alpha_doubles_the_delta() -> None:
    """Alpha enters as alpha / r and nowhere else."""
    values = toys.layer_values(8, scaler=True)
    first = toys.normal_form(toys.layer_tensors(values, alpha=1.5)).delta(2)
    second = toys.normal_form(toys.layer_tensors(values, alpha=3.0)).delta(2)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_does_not_overflow_at_a_low_temperature(dtype: str) -> None:
    """W / tau beyond float16's range, and e^(w / tau) beyond float64's, still mix."""
    values = toys.layer_values(9, ups=3, dtype=dtype)
    logits = np.array([[4000.0, 3000.0, 4000.0], [-4000.0, 4000.0, 0.0], [5e3, 5e3, 5e3]])
    values["mixing"] = logits.astype(values["mixing"].dtype)
    adapter = toys.normal_form(toys.layer_tensors(values, temperature=0.05))
    assert np.isfinite(adapter.core).all()
    cores = adapter.core.reshape(3, 3, toys.RANK, toys.RANK)
    shares = cores[:, :, 0, 0] / cores.sum(axis=1)[:, 0, 0, None]
    expected = np.array([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(shares, expected, rtol=1e-12)


def test_softmax_sums_to_one_over_the_last_axis() -> None:
    """Softmax normalises each task's own row."""
    shares = softmax(np.array([[1.0, 2.0, 4.0], [1e4, -1e4, 0.0]]))
    np.testing.assert_allclose(shares.sum(axis=1), [1, 1])
    assert shares[0, 2] > shares[0, 1] > shares[0, 0]


def test_diagonal_equals_the_full_matrix_with_that_diagonal() -> None:
    """A stored diagonal is the diagonal of Lambda, off-diagonal zero."""
    lambdas, mixing = np.array([[2.0, 3.0]]), np.array([[0.1, 0.4]])
    diagonal = task_cores(lambdas=lambdas, mixing=mixing, temperature=0.2, scale=1.5)
    full = np.array([np.diag(lambdas[0])])
    np.testing.assert_array_equal(
        diagonal, task_cores(lambdas=full, mixing=mixing, temperature=0.2, scale=1.5)
    )


def test_the_worked_example_holds() -> None:
    """The module's docstring computes what it shows."""
    assert doctest.testmod(mtl_lora) == (0, 4)


@pytest.mark.parametrize("name", ["alpha", "temperature"])
def test_an_unknown_hyperparameter_is_asked_for(name: str) -> None:
    """A number that nobody gave is refused, with the option that gives it."""
    layer = toys.layer_tensors(toys.layer_values(1))
    without = replace(layer, hyper={k: v for k, v in layer.hyper.items() if k != name})
    with pytest.raises(HyperparameterError) as caught:
        toys.normal_form(without)
    assert caught.value.problem.startswith(f"toy.dense: {name}")
    assert caught.value.problem
    assert caught.value.expected == "a number"
    assert f"--{name}" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("alpha", float("nan")),
        ("alpha", float("-inf")),
    ],
)
def test_a_senseless_hyperparameter_is_refused(name: str, value: float) -> None:
    """Tau at or below zero and numbers that are not finite never reach the algebra."""
    layer = toys.layer_tensors(toys.layer_values(1))
    with pytest.raises(HyperparameterError) as caught:
        toys.normal_form(replace(layer, hyper={**layer.hyper, name: value}))
    assert name in caught.value.problem
    assert caught.value.problem.endswith(f"{value}")
    assert "finite number" in caught.value.expected
    assert f"--{name}" in caught.value.fix


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("down", (toys.RANK,)),
        ("down", (toys.RANK + 1, 5)),
        ("lambda", (2, toys.RANK, toys.RANK)),
        ("lambda", (3, toys.RANK, toys.RANK + 1)),
        ("lambda", (3, toys.RANK + 1)),
        ("up", (toys.UPS, toys.RANK, 7)),
        ("up", (7, toys.RANK)),
        ("up", (toys.UPS + 1, 7, toys.RANK)),
        ("mixing", (3, toys.UPS + 1)),
        ("mixing", (toys.UPS, 3)),
        ("scaler", (1,)),
        ("down", (0, 5)),
        ("up", (toys.UPS, 0, toys.RANK)),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(role: str, shape: tuple[int, ...]) -> None:
    """One misshapen tensor is refused with all shapes of the layer."""
    values = toys.layer_values(1, scaler=True) | {role: np.ones(shape)}
    with pytest.raises(CheckpointError) as caught:
        toys.normal_form(toys.layer_tensors(values))
    assert caught.value.problem.startswith("toy.dense")
    assert f"{role} {list(shape)}" in caught.value.problem
    assert "lambda [T, r, r] or [T, r]" in caught.value.expected
    assert caught.value.fix


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_roles_are_refused(change: str) -> None:
    """A layer has MTL-LoRA's tensors, all of them and no other."""
    values = toys.layer_values(1)
    if change == "missing":
        del values["mixing"]
    else:
        values["magnitude"] = np.ones(7)
    with pytest.raises(CheckpointError, match="mixing"):
        toys.normal_form(toys.layer_tensors(values))
