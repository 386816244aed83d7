"""How large an error may be: a multiple of what the arithmetic itself costs.

The noise floor of a task is the largest error of the oracle, run in the
candidate's dtype, against the oracle in float64. A correct export differs from the
oracle only by the order of summation and one rounding of each merged weight, so its
error is of the floor's size; a wrong formula's is larger by orders of magnitude.
``FLOOR_FACTOR`` leaves room for the former.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.errors import UsageError

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
    """

    factor: float = FLOOR_FACTOR
    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        """Check that atol and rtol come together and make sense."""
        if (self.atol is None) != (self.rtol is None):
            raise UsageError(
                where="--atol and --rtol",
                found="only one of them",
                expected="both or neither",
                why="one alone would leave the other at a default nobody chose",
                fix="Give both, e.g. --atol 1e-5 --rtol 0",
            )
        for name, value in (("--atol", self.atol), ("--rtol", self.rtol), ("k", self.factor)):
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise UsageError(
                    where=name, found=f"{value}", expected="a finite number, not negative"
                )

    def allowed(self, reference: Array, floor: float) -> Array:
        """Return the largest error allowed at each element of ``reference``."""
        if self.atol is not None and self.rtol is not None:
            by_size: Array = self.atol + self.rtol * np.abs(reference)
            return by_size
        return np.full(reference.shape, self.factor * floor)

    def describe(self) -> str:
        """Return the rule in words."""
        if self.atol is not None:
            return f"|error| <= {self.atol:g} + {self.rtol:g} * |reference|"
        return f"|error| <= {self.factor:g} x noise floor"


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
