"""Calibration data in, ranges and Q/DQ nodes out: ``calibrate`` does it in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_export_calibration.front_door import calibrate

__all__ = ["calibrate"]


def __getattr__(name: str) -> object:
    """Import the verb on first use (PEP 562), so that the package itself costs nothing."""
    if name != "calibrate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtl_export_calibration.front_door import calibrate

    return calibrate
