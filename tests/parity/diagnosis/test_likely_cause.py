"""A cause is named when one known fault explains the output, and only then; in every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mtl_export.adapters.base_layer import BaseLayer
from mtl_export.adapters.binding import BoundModel
from mtl_export.adapters.family import family_named
from mtl_export.checkpoint.checkpoint import LayerTensors
from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.diagnosis.activations import Activation
from mtl_export.parity.diagnosis.known_faults import known_faults, right_formula
from mtl_export.parity.diagnosis.layer_errors import LayerError
from mtl_export.parity.diagnosis.likely_cause import explained
from tests.adapters import toys
from tests.parity.planted import QUERY, WIDE, Exported

FLOOR = 1e-9
ROWS, TOKENS = 3, 4
INPUTS = 12


def draw(seed: int, *shape: int) -> Array:
    """Return seeded normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


X = draw(1, ROWS, TOKENS, INPUTS)


def with_family(
    bound: BoundModel, family: str, values: Mapping[str, Array], hyper: Mapping[str, float],
    gain: Array | None = None,
) -> BoundModel:  # fmt: skip
    """Return a model whose one adapted layer, for as many tasks as it serves, is of a family."""
    stored = {role: toys.memory_tensor(role, value) for role, value in values.items()}
    layer = LayerTensors(QUERY, stored, hyper)
    adapter = family_named(family).layer_adapter(layer, BaseLayer(QUERY, bound.base))
    tasks = bound.adapters.tasks[: adapter.task_count]
    return replace(
        bound,
        checkpoint=replace(bound.checkpoint, family=family, layers={QUERY: layer}),
        adapters=replace(
            bound.adapters,
            tasks=tasks,
            layers={QUERY: replace(adapter, gain=gain)},
            heads={},
        ),
    )


def named(
    bound: BoundModel, y: Array, *, x: Array = X, layer: str = QUERY, task: int = 0,
    floor: float = FLOOR, dtype: str = "fp32", mask: Array | None = None, quantised: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Return cause and detail of a wrong layer that makes ``y`` of ``x``."""
    one = bound.adapters.tasks[task]
    error = LayerError(layer, one.name, "case", 1.0, floor, 1.0, floor, "faulty")
    found = explained(bound, error, one, Activation(x, y, quantised), mask, dtype)
    return found.cause, found.detail


def base(bound: BoundModel, x: Array = X, module: str = QUERY) -> Array:
    """Return the base layer's output."""
    weight = bound.base_tensor(f"{module}.weight").widened().astype(np.float64)
    bias: Array = bound.base_tensor(f"{module}.bias").widened().astype(np.float64)
    return x @ weight.T + bias


def test_a_missing_gate_of_experts_is_named(toy: Exported) -> None:
    """Equal weights for all experts, in the loop of the paper."""
    values = {"down": draw(2, 2, 3, INPUTS), "up": draw(3, 2, 12, 3), "gate": draw(4, 3, 2)}
    bound = with_family(toy.bound, "moe_lora", values, {"alpha": 6.0})
    scale = 6.0 / 6
    y = base(bound) + sum(
        scale * 0.5 * X @ values["down"][e].T @ values["up"][e].T for e in range(2)
    )
    assert named(bound, y) == ("the gate is missing: equal weights for all experts", "")
    y = base(bound) + sum(X @ values["down"][e].T @ values["up"][1 - e].T for e in range(2)) / 2
    assert named(bound, y)[0] == ""


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (0.0, "the adapter is not merged"), (-1.0, "the adapter is subtracted"),
        (2.0, "the adapter is merged twice"), (1 / 3.5, "alpha / r is missing"),
        (3.5, "alpha / r is applied twice"), (5.0, "1 / r is missing"),
        (1 / 17.5, "alpha is missing"), (1.7, ""),
    ],
)  # fmt: skip
def test_the_scale_of_plain_lora_is_named(toy: Exported, times: float, said: str) -> None:
    """Alpha / r is 17.5 / 5; a factor that nobody makes by mistake has no name."""
    values = {"down": draw(5, 5, INPUTS), "up": draw(6, 12, 5)}
    bound = with_family(toy.bound, "lora", values, {"alpha": 17.5})
    y = base(bound) + times * 3.5 * X @ values["down"].T @ values["up"].T
    cause, _ = named(bound, y)
    assert cause.startswith(said)
    assert bool(cause) == bool(said)


def test_a_missing_gain_is_named(toy: Exported) -> None:
    """DoRA's magnitude, its low-rank part, or both."""
    values = {"down": draw(7, 4, INPUTS), "up": draw(8, 12, 4)}
    gain = 1 + 0.3 * draw(9, 1, 12)
    bound = with_family(toy.bound, "lora", values, {"alpha": 4.0}, gain)
    weight = bound.base_tensor(f"{QUERY}.weight").widened().astype(np.float64)
    bias = bound.base_tensor(f"{QUERY}.bias").widened().astype(np.float64)
    delta = values["up"] @ values["down"]
    assert named(bound, X @ (weight + delta).T + bias)[0].startswith("the gain")
    low_rank = named(bound, X @ (gain[0][:, None] * weight).T + bias)[0]
    assert low_rank == "the adapter's low-rank part is missing"
    assert named(bound, X @ weight.T + bias)[0].startswith("the adapter is not merged")


def test_rows_that_take_other_tasks_are_routing(toy: Exported) -> None:
    """Each row has exactly one task's adapter, not its own in all: the ids are not followed."""
    formulas = [right_formula(toy.bound, WIDE, index) for index in range(3)]
    y = np.stack([formula(X[row]) for row, formula in enumerate(formulas) if formula is not None])
    cause, _ = named(toy.bound, y, layer=WIDE, task=1)
    names = ", ".join(task.name for task in toys.TASKS)
    assert cause == f"its rows take the tensors of tasks {names}: routing does not follow task_ids"


def test_faults_that_are_the_same_here_count_as_one(toy: Exported) -> None:
    """A temperature of 1/2 that is doubled is one that is missing: both are true."""
    layer = toy.bound.checkpoint.layers[WIDE]
    changed = replace(layer, hyper={**layer.hyper, "temperature": 0.5})
    adapter = family_named("mtl_lora").layer_adapter(changed, BaseLayer(WIDE, None))
    bound = replace(
        toy.bound,
        checkpoint=replace(toy.bound.checkpoint, layers={WIDE: changed}),
        adapters=replace(toy.bound.adapters, layers={WIDE: adapter}),
    )
    task = bound.adapters.tasks[0]
    y = {fault.cause: fault.formula(X) for fault in known_faults(bound, WIDE, task)}
    assert named(bound, y["the temperature is doubled"], layer=WIDE)[0] == (
        "the temperature is doubled, here the same as: the temperature is missing (1 instead)"
    )


def test_several_faults_that_fit_are_no_cause(toy: Exported) -> None:
    """Where the floor is too high to tell them apart, they are listed and none is claimed."""
    right = right_formula(toy.bound, WIDE, 0)
    assert right is not None
    cause, detail = named(toy.bound, right(X) + 20.0, layer=WIDE, floor=2.6)
    assert cause == ""
    assert "several known faults fit: " in detail


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_overflow_is_named_where_the_dtype_ends(toy: Exported, dtype: str) -> None:
    """Infinite where the layer's own numbers are beyond float16; not otherwise."""
    right = right_formula(toy.bound, WIDE, 0)
    assert right is not None
    big = 3e4 * X
    y = right(big)
    assert np.abs(y).max() > 65504
    y[np.abs(y) > 65504] = np.inf
    cause, _ = named(toy.bound, y, x=big, layer=WIDE, dtype=dtype)
    assert cause.startswith("overflow: fp16 ends at 65504") == (dtype == "fp16")
    small = right(X)
    small[0, 0, 0] = np.nan
    assert named(toy.bound, small, layer=WIDE, dtype=dtype)[0] == ""


def test_what_is_known_of_the_place_is_told(toy: Exported) -> None:
    """Which outputs, which rows, other shapes; padding does not count."""
    right = right_formula(toy.bound, WIDE, 0)
    assert right is not None
    y = right(X)
    one = y.copy()
    one[1, :, 5] += 1.0
    assert named(toy.bound, one, layer=WIDE) == (
        "", "only outputs [5] of 20, only rows [1] of the task's"
    )  # fmt: skip
    mask = np.ones((ROWS, TOKENS), np.bool_)
    mask[2, 2:] = False
    padded = one.copy()
    padded[2, 2:] = 99.0
    assert named(toy.bound, padded, layer=WIDE, mask=mask) == named(toy.bound, one, layer=WIDE)
    assert named(toy.bound, y, x=X[..., :7], layer=WIDE)[1] == "it is given 7 features"
    assert named(toy.bound, y[:, :2], layer=WIDE)[1] == "it puts out [3, 2, 20]"
    assert named(toy.bound, one, layer=WIDE, quantised=True) == ("", "its input is quantised")
    norm = "bert.encoder.layer.0.output.LayerNorm"
    assert named(toy.bound, y, layer=norm) == ("", "")
