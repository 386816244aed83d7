from __future__ import annotations

import numpy as np

from mtl_export.adapters.normal_form import Factors, Head, LayerAdapter, OwnAdapter
from mtl_export.graph.passes.stacks import (
    stacked_blocks,
    stacked_cores,
    stacked_heads,
    with_poison,
)
from tests.graph import marked


def test_poison_is_one_more_slice_of_nan() -> None:
    """T slices stay as they are and slice T is NaN."""
    stack = with_poison(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(stack[:2], np.arange(6.0).reshape(2, 3))
    assert stack.shape == (3, 3)
    assert np.isnan(stack[2]).all()


def test_shared_factors_are_laid_out_for_row_vectors() -> None:
    """X . down . core[t] . up is x . delta(t)^T."""
    layer = marked.bound().adapters.layers["enc.wide"]
    assert isinstance(layer, LayerAdapter)
    stacks = stacked_cores(layer)
    for task in range(3):
        product = stacks["down"] @ stacks["core"][task] @ stacks["up"]
        np.testing.assert_allclose(product, layer.delta(task).T, rtol=1e-6, atol=1e-6)
    assert np.isnan(stacks["core"][3]).all()


def test_own_factors_are_padded_to_the_widest_rank() -> None:
    """X . downs[t] . ups[t] is x . delta(t)^T whatever each task's rank; none gives zero."""
    generator = np.random.default_rng(0)
    blocks = tuple(
        None if rank is None else Factors(
            generator.normal(size=(rank, 5)), generator.normal(size=(rank + 1, rank)),
            generator.normal(size=(7, rank + 1)),
        )
        for rank in (2, None, 3)
    )  # fmt: skip
    layer = OwnAdapter("m", 5, 7, blocks)
    stacks = stacked_blocks(layer)
    assert stacks["downs"].shape == (4, 5, 3)
    for task in range(3):
        product = stacks["downs"][task] @ stacks["ups"][task]
        np.testing.assert_allclose(product, layer.delta(task).T, rtol=1e-12, atol=1e-12)
    assert np.isnan(stacks["downs"][3]).all()
    assert np.isnan(stacks["ups"][3]).all()


def test_heads_are_padded_to_the_widest() -> None:
    """A label that a task lacks has weight 0 and bias -inf."""
    heads = (
        Head(np.full((2, 5), 3.0), np.array([1.0, 2.0])),
        Head(np.full((3, 5), 4.0), np.ones(3)),
    )
    weights, biases = stacked_heads(heads)
    assert weights.shape == (3, 5, 3)
    np.testing.assert_array_equal(weights[0], [[3.0, 3.0, 0.0]] * 5)
    np.testing.assert_array_equal(biases[0], [1.0, 2.0, -np.inf])
    np.testing.assert_array_equal(biases[1], [1.0, 1.0, 1.0])
    assert np.isnan(weights[2]).all()
    assert np.isnan(biases[2]).all()
