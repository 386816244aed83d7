"""Outputs of two backends into a ``ParityReport``."""

from __future__ import annotations

from mtl_export.callable_package import make_callable

make_callable(__name__)
