from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn import functional

from mtl_export.checkpoint.tensors import Array
from mtl_export.parity.cases import Case
from mtl_export.parity.outputs import Subject
from mtl_export.parity.reference import MOST_ORDERS, ORDERS, Reference, noise_floors
from mtl_export.parity.summation import AnotherOrder
from tests.parity.fakes import TASKS, FakeRunner


def whole(*shape: int) -> torch.Tensor:
    """Return whole numbers in float64: their sums are exact in every order."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-9, 9, shape, generator=generator).to(torch.float64)


X, BATCHED = whole(4, 7), whole(2, 4, 7)
PRODUCTS = {
    "linear": lambda: functional.linear(BATCHED, whole(3, 7), whole(3)),
    "matmul": lambda: torch.matmul(BATCHED, whole(2, 7, 5)),
    "at": lambda: BATCHED @ whole(7, 5),
    "of a vector": lambda: X @ whole(7),
    "bmm": lambda: torch.bmm(BATCHED, whole(2, 7, 5)),
    "addmm": lambda: torch.addmm(whole(5), X, whole(7, 5)),
    "no product": lambda: torch.cumsum(X, dim=1),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_another_order_computes_the_same(product: str) -> None:
    """Where nothing is rounded, no order differs: operands are permuted alike."""
    expected = PRODUCTS[product]()
    for seed in range(3):
        with AnotherOrder(seed):
            assert torch.equal(PRODUCTS[product](), expected)


def test_attention_adds_up_its_heads_in_another_order() -> None:
    """Queries and keys are permuted alike, values and their sums are not."""
    query, key, value = (whole(1, 2, 5, 7) / 16 for _ in range(3))
    expected = functional.scaled_dot_product_attention(query, key, value)
    with AnotherOrder(1):
        found = functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize(
    ("dtype", "ulp"),
    [(torch.float32, 2**-23), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)],
)
def test_low_precision_is_rounded_otherwise(dtype: torch.dtype, ulp: float) -> None:
    """Results move, by about what one rounding of each input is worth, and by the seed alone."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(8, 96, generator=generator).to(dtype) for _ in range(2))
    plain = functional.linear(x, weight).double()
    found = []
    for seed in (1, 1, 2):
        with AnotherOrder(seed):
            found.append(functional.linear(x, weight).double())
    moved = (found[0] - plain).abs().max() / plain.abs().max()
    assert 0 < moved < 4 * ulp
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def floor_of(errors: list[float]) -> tuple[float, int]:
    """Return the floor that ``errors`` of one order after another give, and how many were run."""
    exact = np.ones((3, 4))
    case = Case("all", {"task_ids": np.arange(3)})
    runs = iter(range(len(errors)))
    done: list[int] = []

    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        done.append(next(runs))
        return {"logits": exact + errors[done[-1]]}

    reference = Reference(case, Subject("logits"), exact, "all")
    floors = noise_floors(TASKS, [reference], FakeRunner(answer), "fp32")
    return floors[Subject("logits")], len(done)


def test_a_floor_is_the_largest_of_several_orders() -> None:
    """An order whose errors cancel by chance is no measure."""
    floor, tried = floor_of([1e-5, 2e-5, 3e-5, 1e-5])
    assert floor == pytest.approx(3e-5)
    assert tried == ORDERS


def test_where_orders_differ_much_many_are_tried() -> None:
    """A floor that jumps is not known from four orders."""
    errors = [1e-6, 2e-5, 1e-6, 1e-6] + [1e-6] * (MOST_ORDERS - 5) + [8e-5]
    floor, tried = floor_of(errors)
    assert floor == pytest.approx(8e-5)
    assert tried == MOST_ORDERS
