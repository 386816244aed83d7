from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_export.checkpoint.tensors import NUMPY_DTYPES, Array
from mtl_export.merge.rounding import Scratch, round_values

# significand bits, smallest exponent of a subnormal's last bit
FORMATS = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}


def nearest(value: float, dtype: str) -> float:
    """Return the nearest value of ``dtype``, ties to even, in exact arithmetic."""
    bits, smallest = FORMATS[dtype]
    exact = Fraction(value)
    if not exact:
        return 0.0
    exponent = max(int(np.frexp(value)[1]) - bits, smallest)
    unit = Fraction(2) ** exponent
    return float(round(exact / unit) * unit)  # Fraction rounds half to even


def rounded(values: list[float], dtype: str) -> Array:
    """Return what ``Scratch.round_to`` makes of ``values``, as float64."""
    exact = np.array(values, np.float64)
    out: Array = np.empty(exact.size, NUMPY_DTYPES[dtype])
    Scratch(max(1, exact.size)).round_to(exact, dtype, out)
    return out.astype(np.float64)


@pytest.mark.parametrize("dtype", FORMATS)
@given(st.lists(st.floats(-60000, 60000, allow_subnormal=True), min_size=1, max_size=40))
def test_every_value_is_rounded_once(dtype: str, values: list[float]) -> None:
    """The result is the nearest value of the dtype in exact arithmetic."""
    np.testing.assert_array_equal(rounded(values, dtype), [nearest(v, dtype) for v in values])


@pytest.mark.parametrize("dtype", FORMATS)
@given(
    st.floats(2.0**-13, 60000, width=16),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from([-1.0, 1.0]),
)
def test_half_ways_and_what_lies_a_hair_beside_them(
    dtype: str, near: float, side: int, sign: float
) -> None:
    """A second rounding, by way of float32, would send these to the wrong neighbour."""
    value = nearest(near, dtype)
    step = 2.0 ** (np.frexp(value)[1] - FORMATS[dtype][0])
    middle = value + step / 2
    exact = sign * float(np.nextafter(middle, np.inf * side)) if side else sign * middle
    assert rounded([exact], dtype)[0] == nearest(exact, dtype)


@pytest.mark.parametrize("ties", range(9))
@pytest.mark.parametrize("at_end", [False, True])
def test_any_number_of_ties_in_a_block(ties: int, at_end: bool) -> None:
    """Few ties are settled one by one, many together; both ways up, down and to even."""
    values = [0.3 + n / 7 for n in range(20)]
    for number in range(ties):
        middle = 1 + 2.0**-8 + (number % 2) * 2.0**-7
        place = len(values) - 1 - number if at_end else 2 * number
        values[place] = middle * (1 + (number % 3 - 1) * 2.0**-45) * (-1.0) ** (number // 2)
    np.testing.assert_array_equal(rounded(values, "BF16"), [nearest(v, "BF16") for v in values])


def test_ml_dtypes_alone_would_round_twice() -> None:
    """The reason for the integer path; if this fails, the path may be dropped."""
    just_above = np.array([1 + 2.0**-8 + 2.0**-40])
    assert just_above.astype(ml_dtypes.bfloat16)[0] == 1.0
    assert rounded([float(just_above[0])], "BF16")[0] == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("dtype", "largest"), [("BF16", 3.3895313892515355e38), ("F16", 65504.0), ("F32", 2.0**128)]
)
def test_what_does_not_fit_is_told(dtype: str, largest: float) -> None:
    """Overflow and NaN are reported, wherever they are in the block; the largest value is not."""
    out: Array = np.empty(5, NUMPY_DTYPES[dtype])
    scratch = Scratch(5)
    fits = largest if dtype != "F32" else float(np.finfo(np.float32).max)
    assert scratch.round_to(np.array([0.0, fits, -fits, 1.0, 2.0]), dtype, out)
    for bad in (largest * 1.01, -largest * 1.01, np.nan, np.inf):
        for place in range(5):
            values = np.zeros(5)
            values[place] = bad
            assert not scratch.round_to(values, dtype, out)


@pytest.mark.parametrize("source", ["F32", "BF16", "F16", "F64"])
def test_values_longer_than_the_scratch_are_rounded_block_by_block(source: str) -> None:
    """Shape and values survive, whatever the block size."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(7, 11)).astype(NUMPY_DTYPES[source])
    result, finite = round_values(values, "BF16", Scratch(10))
    assert finite
    assert result.shape == (7, 11)
    expected = [nearest(float(v), "BF16") for v in values.reshape(-1).astype(np.float64)]
    np.testing.assert_array_equal(result.reshape(-1).astype(np.float64), expected)
