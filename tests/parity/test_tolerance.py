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
    assert caught.value.expected.partition(", because ")[0] == "both or neither"
    assert "--rtol" in caught.value.fix


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["atol", "rtol", "factor"])
def test_a_senseless_tolerance_is_refused(name: str, bad: float) -> None:
    """A negative, NaN or infinite allowance would pass everything or nothing."""
    values = {"atol": 1.0, "rtol": 1.0, "factor": 1.0} | {name: bad}
    with pytest.raises(UsageError, match="a finite number, not negative"):
        Tolerance(**values)  # type: ignore[arg-type]


def test_outputs_may_have_a_tolerance_of_their_own() -> None:
    """name:value, beside the plain number that holds for all others."""
    tolerance = Tolerance.from_texts(["1e-5", "pooler_output:1e-3", "a:b:2"], ["0"])
    assert (tolerance.atol, tolerance.rtol) == (1e-5, 0.0)
    assert tolerance.of("logits").atol == 1e-5
    assert (tolerance.of("pooler_output").atol, tolerance.of("pooler_output").rtol) == (1e-3, 0.0)
    assert tolerance.of("a:b").atol == 2.0
    assert tolerance.describe() == (
        "|error| <= 1e-05 + 0 * |reference|; a:b: |error| <= 2 + 0 * |reference|;"
        " pooler_output: |error| <= 0.001 + 0 * |reference|"
    )
    named = Tolerance.from_texts(["logits:1e-4"], ["logits:1e-2"])
    assert named.of("logits").rtol == 1e-2
    assert named.of("other").atol is None
    named.refuse_unknown(["logits", "other"])
    with pytest.raises(UsageError, match="logits") as caught:
        named.refuse_unknown(["last_hidden_state"])
    assert "last_hidden_state" in caught.value.expected


def test_a_number_for_all_completes_those_for_one() -> None:
    """Atol = { logits = 1e-4 } beside rtol = 0.0: other outputs keep the noise floor."""
    for atol, rtol in ((["logits:1e-4"], ["0"]), (["1e-4"], ["logits:0"])):
        tolerance = Tolerance.from_texts(atol, rtol)
        assert (tolerance.of("logits").atol, tolerance.of("logits").rtol) == (1e-4, 0.0)
        assert (tolerance.of("other").atol, tolerance.of("other").rtol) == (None, None)
        assert tolerance.describe() == (
            "|error| <= 8 x noise floor; logits: |error| <= 0.0001 + 0 * |reference|"
        )


@pytest.mark.parametrize(
    ("atol", "rtol", "reason"),
    [
        (["x"], ["0"], "'x' is no number"),
        (["logits:"], ["0"], "'' is no number"),
        (["1e-5", "2e-5"], ["0"], "two numbers for all outputs"),
        (["a:1", "a:2"], ["0"], "two numbers for a"),
        (["a:1"], [], "only one of them"),
        (["a:1"], ["b:1"], "only one of them"),
        (["a:nan"], ["a:0"], "nan"),
        (["a:1"], ["a:0", "0"], "only one of them"),
        (["a:1", "1"], ["a:0"], "only one of them"),
    ],
)
def test_a_tolerance_that_means_nothing_is_refused(
    atol: list[str], rtol: list[str], reason: str
) -> None:
    """No number, two of them, or one without its counterpart."""
    with pytest.raises(UsageError) as caught:
        Tolerance.from_texts(atol, rtol)
    assert reason in str(caught.value)


@pytest.mark.parametrize("rtol", [0.0, 0.5])
def test_the_least_atol_passes_and_less_does_not(rtol: float) -> None:
    """Beside the rtol in force; without atol and rtol it is the largest error."""
    reference = np.array([[1.0, -8.0], [0.5, 0.0]])
    errors = np.array([[0.25, 1.0], [0.5, 0.125]])
    least = Tolerance(atol=0.0, rtol=rtol).least_atol(reference, errors)
    assert least == (1.0 if rtol == 0 else 0.25)
    for atol, passes in ((least, True), (least * 0.99, False)):
        allowed = Tolerance(atol=atol, rtol=rtol).allowed(reference, 0.0)
        assert bool((errors <= allowed).all()) is passes
    assert Tolerance().least_atol(reference, errors) == 1.0
