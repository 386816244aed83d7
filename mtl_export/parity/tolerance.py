"""How large an error may be: a multiple of what the arithmetic itself costs.

The noise floor of a task is the largest error of the oracle, run in the
candidate's dtype, against the oracle in float64. A correct export differs from the
oracle only by the order of summation and one rounding of each merged weight, so its
error is of the floor's size; a wrong formula's is larger by orders of magnitude.
``FLOOR_FACTOR`` leaves room for the former.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import UsageError, shortened

# Measured on the example model (pytest tests/benchmarks/bench_noise.py -m benchmark -s): correct
# graphs err by 0.8 floors in the median and 2.7 at worst; the least planted fault, a temperature
# off by one percent, by 900.
FLOOR_FACTOR = 8.0


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the user allows.

    Attributes:
        factor: Times the noise floor, used when ``atol`` is None.
        atol: Absolute error, overrides the floor.
        rtol: Relative error, given exactly when ``atol`` is.
        by_output: What holds for single outputs in place of all that.
    """

    factor: float = FLOOR_FACTOR
    atol: float | None = None
    rtol: float | None = None
    by_output: Mapping[str, Tolerance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that atol and rtol come together and make sense."""
        if (self.atol is None) != (self.rtol is None):
            raise UsageError(
                "--atol and --rtol: only one of them",
                expected=(
                    "both or neither, because one alone would leave the other at a default nobody "
                    "chose"
                ),
                fix="Give both, e.g. --atol 1e-5 --rtol 0",
            )
        for name, value in (("--atol", self.atol), ("--rtol", self.rtol), ("k", self.factor)):
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise UsageError(f"{name}: {value}", expected="a finite number, not negative")

    @classmethod
    def from_texts(cls, atol: Sequence[str], rtol: Sequence[str]) -> Tolerance:
        """Return what options such as ``1e-5`` and ``logits:1e-4`` mean.

        A number without a name holds for every output that is not named, and completes those
        that are. If only one of the two has such a number, other outputs keep the noise floor.

        Raises:
            UsageError: One is no number, is given twice, or has no counterpart.
        """
        absolute, relative = _by_name("--atol", atol), _by_name("--rtol", rtol)
        any_atol, any_rtol = absolute.pop("", None), relative.pop("", None)
        named = {
            name: cls(atol=absolute.get(name, any_atol), rtol=relative.get(name, any_rtol))
            for name in (*absolute, *relative)
        }
        lacking = absolute if any_rtol is None else relative
        if (any_atol is None) != (any_rtol is None) and named.keys() - lacking:
            return cls(by_output=named)
        return cls(atol=any_atol, rtol=any_rtol, by_output=named)

    def of(self, output: str) -> Tolerance:
        """Return what holds for an output."""
        return self.by_output.get(output, self)

    def refuse_unknown(self, outputs: Collection[str]) -> None:
        """Refuse a tolerance for an output that is not compared.

        Raises:
            UsageError: It names it.
        """
        unknown = [name for name in self.by_output if name not in outputs]
        if unknown:
            raise UsageError(
                f"--atol and --rtol: outputs that are not compared: {shortened(unknown)}",
                expected=f"one of {shortened(outputs)}",
                fix="Correct the name before the colon",
            )

    def allowed(self, reference: Array, floor: float) -> Array:
        """Return the largest error allowed at each element of ``reference``."""
        if self.atol is not None and self.rtol is not None:
            by_size: Array = self.atol + self.rtol * np.abs(reference)
            return by_size
        return np.full(reference.shape, self.factor * floor)

    def least_atol(self, reference: Array, errors: Array) -> float:
        """Return the least ``atol`` that ``errors`` pass under, beside the ``rtol`` in force."""
        relative = (self.rtol or 0.0) * np.abs(reference)
        return float(np.maximum(errors - relative, 0.0).max(initial=0.0))

    def describe(self) -> str:
        """Return the rule in words."""
        rule = f"|error| <= {self.factor:g} x noise floor"
        if self.atol is not None:
            rule = f"|error| <= {self.atol:g} + {self.rtol:g} * |reference|"
        named = (f"; {name}: {own.describe()}" for name, own in sorted(self.by_output.items()))
        return rule + "".join(named)


def _by_name(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Return numbers by output, the one for all others under the empty name."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            raise UsageError(
                f"{option} {text}: {number!r} is no number",
                expected="a number, or an output and a number",
                fix=f"Write it like {option} 1e-5 or {option} logits:1e-5",
            ) from None
        if name in found:
            raise UsageError(
                f"{option}: two numbers for {name or 'all outputs'}",
                expected="one",
                fix="Leave one out",
            )
        found[name] = value
    return found


# Half a unit in the last place at 1, by dtype.
HALF_ULP = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


def noise_floor(reference: Array, lower_precision: Array, dtype: str) -> float:
    """Return the largest error of the oracle in the candidate's dtype.

    Never below half a unit in the last place of that dtype at the largest output: a
    floor of 0, which a lucky batch can give, would fail every correct export.
    """
    finite = np.isfinite(reference)
    largest = float(np.abs(reference[finite]).max(initial=0.0))
    error = float(np.abs(lower_precision[finite] - reference[finite]).max(initial=0.0))
    return max(error, HALF_ULP[dtype] * largest)
