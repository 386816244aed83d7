"""Who measures activations: ONNX Runtime, which is always there, or another by the same call.

An engine takes a graph, its layers and one task's rows and returns every activation's
statistics; combining tasks, writing Q/DQ and the accuracy gate are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from mtl_export.errors import BackendMissingError
from mtl_export_calibration.collect import TensorStatistics, collect
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.samples import Samples

ONNXRUNTIME, MODELOPT = "onnxruntime", "modelopt"


class Engine(Protocol):
    """What measures activations; see ``collect.collect``."""

    def __call__(
        self,
        path: Path,
        layers: Sequence[QuantLayer],
        samples: Samples,
        *,
        threads: int = 0,
        progress: Callable[[int, int], None] = ...,
    ) -> dict[str, TensorStatistics]:
        """Return the statistics of every layer's activation, by its name."""
        ...


def engine_named(name: str) -> Engine:
    """Return the engine called ``name``.

    Raises:
        BackendMissingError: There is none that can be called.
    """
    if name == ONNXRUNTIME:
        return collect
    installed = name == MODELOPT and find_spec("modelopt") is not None
    raise BackendMissingError(
        where=f"calibration engine {name}",
        found="installed, but this version has no adapter for it"
        if installed
        else "not installed, and this version has no adapter for it",
        expected=ONNXRUNTIME,
        fix=f"Leave the engine out: {ONNXRUNTIME} measures the same ranges",
    )
