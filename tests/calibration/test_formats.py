from __future__ import annotations

import numpy as np
import pytest

from mtl_export_calibration.formats import FORMATS, FP8, INT4, INT8, NumberFormat, format_named


def test_int8_rounds_to_the_nearest_step_and_ties_to_even() -> None:
    """They are cut at +-127; -128 is not used."""
    scale = INT8.scale(np.array(63.5))
    assert scale == np.float32(0.5)
    values = np.array([0.0, 0.25, 0.75, -0.26, 63.5, 90.0, -90.0])
    assert INT8.stored(values, scale).tolist() == [0, 0, 2, -1, 127, 127, -127]
    assert INT8.rounded(values, scale).tolist() == [0, 0, 1, -0.5, 63.5, 63.5, -63.5]


def test_fp8_is_e4m3() -> None:
    """Three bits behind the point: between 16 and 32 the steps are 2; the largest is 448."""
    scale = FP8.scale(np.array(448.0))
    values = np.array([17.0, 19.0, 21.0, 448.0, 1e4])
    assert FP8.rounded(values, scale).tolist() == [16.0, 20.0, 20.0, 448.0, 448.0]


def test_int4_has_sixteen_numbers() -> None:
    """-8 to 7."""
    values = np.linspace(-9, 9, 100)
    assert sorted(set(INT4.rounded(values, INT4.scale(np.array(7.0))).tolist())) == [*range(-8, 8)]


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
def test_zeros_have_a_scale_that_divides(number: NumberFormat) -> None:
    """A channel of zeros stays zeros, without NaN."""
    scale = number.scale(np.zeros(3))
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert not number.rounded(np.zeros(3), scale).any()
    assert format_named(number.name) is number
