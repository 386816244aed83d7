"""Latency, throughput and memory of what was exported."""

from __future__ import annotations

from mtl_export.callable_package import make_callable

make_callable(__name__)
