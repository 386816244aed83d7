from __future__ import annotations

import numpy as np
import pytest

from mtl_export.errors import UsageError
from mtl_export.parity.tolerance import FLOOR_FACTOR, HALF_ULP, Tolerance, noise_floor

REFERENCE = np.array([[1.0, -4.0], [0.5, -np.inf]])


def test_the_floor_is_the_largest_error_of_the_lower_precision() -> None:
    """Labels that a task lacks do not count, and raise no warning."""
    lower = REFERENCE + np.array([[0.0, -0.25], [0.125, 0.0]])
    assert noise_floor(REFERENCE, lower, "fp32") == 0.25


@pytest.mark.parametrize(("dtype", "bits"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_the_floor_is_never_below_half_a_unit_in_the_last_place(dtype: str, bits: int) -> None:
    """A lucky batch without error still has the floor of its largest output."""
    assert HALF_ULP[dtype] == 2.0**-bits
    assert noise_floor(REFERENCE, REFERENCE.copy(), dtype) == 4 * 2.0**-bits


def test_a_floor_that_is_not_finite_stays_so() -> None:
    """NaN and Inf are handed on, for run_parity to refuse, and not lost in a maximum."""
    for bad in (np.nan, np.inf):
        lower = REFERENCE.copy()
        lower[0, 0] = bad
        assert not np.isfinite(noise_floor(REFERENCE, lower, "fp32"))


def test_the_default_allows_a_multiple_of_the_floor() -> None:
    """Without atol and rtol every element may be off by k times the floor."""
    tolerance = Tolerance()
    np.testing.assert_array_equal(
        tolerance.allowed(REFERENCE, 0.25), np.full((2, 2), FLOOR_FACTOR * 0.25)
    )
    assert tolerance.describe() == f"|error| <= {FLOOR_FACTOR:g} x noise floor"
    np.testing.assert_array_equal(Tolerance(factor=3).allowed(REFERENCE, 0.25)[0], [0.75, 0.75])


def test_atol_and_rtol_override_the_floor() -> None:
    """|error| <= atol + rtol |reference|, element by element."""
    tolerance = Tolerance(atol=0.5, rtol=0.25)
    np.testing.assert_array_equal(tolerance.allowed(REFERENCE[0], 99.0), [0.75, 1.5])
    assert tolerance.describe() == "|error| <= 0.5 + 0.25 * |reference|"
    np.testing.assert_array_equal(Tolerance(atol=0, rtol=0).allowed(REFERENCE[0], 9.0), [0, 0])


@pytest.mark.parametrize("given", [{"atol": 1e-5}, {"rtol": 1e-5}])
def test_one_of_atol_and_rtol_is_refused(given: dict[str, float]) -> None:
    """Both or neither: one alone would leave the other to chance."""
    with pytest.raises(UsageError) as caught:
        Tolerance(atol=given.get("atol"), rtol=given.get("rtol"))
    assert caught.value.expected == "both or neither"
    assert "--rtol" in caught.value.fix


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["atol", "rtol", "factor"])
def test_a_senseless_tolerance_is_refused(name: str, bad: float) -> None:
    """A negative, NaN or infinite allowance would pass everything or nothing."""
    values = {"atol": 1.0, "rtol": 1.0, "factor": 1.0} | {name: bad}
    with pytest.raises(UsageError, match="a finite number, not negative"):
        Tolerance(**values)
