from __future__ import annotations

import numpy as np
import pytest

from mtl_export.adapters.normal_form import NO_LABEL, AdapterSet, Head, LayerAdapter
from mtl_export.checkpoint.checkpoint import Task
from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import AdapterError, CheckpointError

T, U, D, O, I = 3, 6, 4, 7, 5  # noqa: E741 - the names of normal_form


def factors() -> dict[str, Array]:
    """Return seeded factors of unequal sizes."""
    generator = np.random.default_rng(0)
    return {
        "down": generator.normal(size=(D, I)).astype(np.float32),
        "core": generator.normal(size=(T, U, D)),
        "up": generator.normal(size=(O, U)).astype(np.float32),
    }


def layer_of(module: str, parts: dict[str, Array]) -> LayerAdapter:
    """Return the layer with these factors."""
    return LayerAdapter(module, down=parts["down"], core=parts["core"], up=parts["up"])


def test_delta_is_up_core_down_in_float64() -> None:
    """The delta of a task is the product of its three factors, taken in float64."""
    parts = factors()
    layer = layer_of("m", parts)
    for task in range(T):
        expected = np.einsum(
            "ou,ud,di->oi",
            parts["up"].astype(float), parts["core"][task], parts["down"].astype(float),
        )  # fmt: skip
        delta = layer.delta(task)
        assert delta.dtype == np.float64
        np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-13)


def test_sizes_are_read_off_the_factors() -> None:
    """T, I and O come from core, down and up."""
    layer = layer_of("m", factors())
    assert (layer.task_count, layer.in_features, layer.out_features) == (T, I, O)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("core", (T, D, U)),
        ("core", (U, D)),
        ("up", (U, O)),
        ("down", (I, D)),
        ("down", (D,)),
        ("up", (O, U, 1)),
    ],
)
def test_factors_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """A transposed or flattened factor is an error, not a broadcast."""
    with pytest.raises(AdapterError) as caught:
        layer_of("enc.dense", factors() | {name: np.ones(shape)})
    assert caught.value.problem.startswith("enc.dense")
    assert str(shape) in caught.value.problem
    assert "core [T, U, D]" in caught.value.expected
    assert caught.value.fix


def adapter_set(task_count: int, head_count: int) -> AdapterSet:
    """Return a set whose layer has T tasks and whose heads and names have others."""
    return AdapterSet(
        family="mtl_lora",
        tasks=tuple(Task(f"t{i}", i) for i in range(task_count)),
        layers={"enc.dense": layer_of("enc.dense", factors())},
        heads={"classifier": (Head(np.ones((2, I)), np.ones(2)),) * head_count},
        model_class="",
        checkpoint_sha256="",
    )


@pytest.mark.parametrize(
    ("tasks", "heads", "wrong"), [(2, 2, "enc.dense: 3 tasks"), (3, 4, "classifier: 4 heads")]
)
def test_every_layer_and_head_serves_every_task(tasks: int, heads: int, wrong: str) -> None:
    """A layer or head with another task count than the checkpoint is refused by name."""
    with pytest.raises(CheckpointError) as caught:
        adapter_set(tasks, heads)
    assert wrong in caught.value.problem
    assert caught.value.expected.partition(", because ")[0] == f"{tasks} tasks everywhere"
    assert "t0" in caught.value.expected
    assert caught.value.fix


def test_a_set_that_agrees_is_accepted() -> None:
    """Equal task counts everywhere make a set."""
    assert len(adapter_set(T, T).tasks) == T


def test_a_label_that_a_task_lacks_is_minus_infinity() -> None:
    """No label can never win an argmax."""
    assert -np.inf == NO_LABEL
