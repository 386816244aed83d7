from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.adapters.normal_form import LayerAdapter
from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.errors import BaseModelError
from mtl_export.merge.fold import merged_weight, rounded

T, U, D, O, I = 3, 4, 2, 7, 5  # noqa: E741 - the names of normal_form
# Significant bits, exponent of the smallest step, of each dtype (IEEE 754; bfloat16 is float32's
# upper half).
FORMATS = {"F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}


def nearest(value: float, dtype: str) -> float:
    """Return ``value`` rounded once to ``dtype``, ties to even, in exact arithmetic."""
    bits, smallest = FORMATS[dtype]
    if value == 0:
        return value
    _, exponent = math.frexp(value)
    step = math.ldexp(1.0, max(exponent - bits, smallest))
    return round(value / step) * step  # both exact: step is a power of two


def exact_layer(seed: int) -> LayerAdapter:
    """Return factors whose products and sums are exact in float64, whatever the order."""
    generator = np.random.default_rng(seed)

    def sixteenths(*shape: int) -> Array:
        return np.asarray(generator.integers(1, 1000, shape) / 16.0)

    return LayerAdapter(
        "enc.dense",
        down=sixteenths(D, I).astype(np.float32),
        core=sixteenths(T, U, D) / 2**30,
        up=sixteenths(O, U).astype(np.float32),
    )


def with_delta(delta: float) -> LayerAdapter:
    """Return a 1 x 1 layer of one task whose delta is exactly ``delta``."""
    one = np.ones((1, 1), np.float32)
    return LayerAdapter("enc.dense", down=one, core=np.array([[[delta]]]), up=one)


@pytest.mark.parametrize("dtype", sorted(FORMATS))
@pytest.mark.parametrize("base_dtype", ["F64", "F32", "F16", "BF16"])
def test_the_merged_weight_is_the_exact_sum_rounded_once(base_dtype: str, dtype: str) -> None:
    """Every element is W + up core_t down, taken in float64 and rounded to nearest once."""
    layer = exact_layer(1)
    weight = (np.arange(O * I).reshape(O, I) / 8 - 1.25).astype(NUMPY_DTYPES[base_dtype])
    before = weight.tobytes()
    for task in range(T):
        merged = merged_weight(weight, layer, task, dtype)
        assert merged.dtype == NUMPY_DTYPES[dtype]
        exact = weight.astype(np.float64) + np.einsum(
            "ou,ud,di->oi", layer.up.astype(float), layer.core[task], layer.down.astype(float)
        )
        expected = [[nearest(float(value), dtype) for value in row] for row in exact]
        np.testing.assert_array_equal(merged.astype(np.float64), np.array(expected))
    assert weight.tobytes() == before, "the base was changed"


@pytest.mark.parametrize(
    ("dtype", "delta", "expected"),
    [
        # Just above and just below half way between two bfloat16; float32 cannot tell.
        ("BF16", 2**-8 + 2**-40, 1 + 2**-7),
        ("BF16", 3 * 2**-8 - 2**-40, 1 + 2**-7),
        ("BF16", 2**-8, 1.0),
        ("BF16", 3 * 2**-8, 1 + 2**-6),
        ("F16", 2**-11 + 2**-40, 1 + 2**-10),
        ("F16", 3 * 2**-11 - 2**-40, 1 + 2**-10),
        ("F16", 2**-11, 1.0),
        ("F32", 2**-24 + 2**-50, 1 + 2**-23),
        ("F32", 2**-24, 1.0),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_near_half_way_is_not_rounded_twice(
    dtype: str, delta: float, expected: float, sign: float
) -> None:
    """A value beside a tie goes to its nearest neighbour, a tie to the even one."""
    weight = np.full((1, 1), sign, np.float32)
    merged = merged_weight(weight, with_delta(sign * delta), 0, dtype)
    assert float(merged[0, 0]) == sign * expected


@given(
    coarse=st.integers(-(2**12), 2**12),
    fine=st.integers(-3, 3),
    gap=st.integers(14, 44),
    exponent=st.integers(-140, 100),
    dtype=st.sampled_from(sorted(FORMATS)),
)
def test_rounding_is_to_nearest_everywhere(
    coarse: int, fine: int, gap: int, exponent: int, dtype: str
) -> None:
    """Values on, above and below ties, subnormals included, round as exact arithmetic does."""
    exponent = min(exponent, 2) if dtype == "F16" else exponent
    value = math.ldexp(coarse + fine * 2.0**-gap, exponent)
    result = rounded(np.array([value]), dtype, "here")
    assert float(result[0]) == nearest(value, dtype)


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        ("F16", 65519.99, 65520.0),
        ("BF16", 3.3895e38, 3.3962e38),
        ("F32", 3.4028235e38, 3.5e38),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_weight_beyond_the_dtype_is_refused(
    dtype: str, largest: float, beyond: float, sign: float
) -> None:
    """Overflow is an error with layer, task and dtype, not an Inf in the file."""
    weight = np.full((1, 1), sign * largest / 2)
    fits = merged_weight(weight, with_delta(sign * largest / 2), 0, dtype)
    assert np.isfinite(fits.astype(np.float64)).all()
    with pytest.raises(BaseModelError) as caught:
        merged_weight(weight, with_delta(sign * (beyond - largest / 2)), 0, dtype)
    assert caught.value.problem.startswith("enc.dense, task id 0")
    assert f"NaN or Inf in {dtype}" in caught.value.problem
    assert caught.value.expected.partition(", because ")[0] == "finite weights"
    assert "--dtype" in caught.value.fix


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_a_base_that_is_not_finite_is_refused(bad: float, dtype: str) -> None:
    """NaN or Inf in the base would spread to every output."""
    weight = np.ones((O, I), np.float32)
    weight[3, 2] = bad
    with pytest.raises(BaseModelError, match="NaN or Inf"):
        merged_weight(weight, exact_layer(1), 1, dtype)
