"""Who measures activations and chooses ranges: our own calibrators, or modelopt's.

An engine takes a graph, its layers and one task's rows and returns every activation's
statistics, which know its range; combining tasks, writing Q/DQ and the accuracy gate are
the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from mtl_export.data.samples import Samples
from mtl_export.errors import BackendMissingError, UsageError
from mtl_export_calibration import modelopt
from mtl_export_calibration.collect import TensorStatistics, collect
from mtl_export_calibration.formats import NumberFormat
from mtl_export_calibration.layers import QuantLayer
from mtl_export_calibration.ranges import WEIGHTED

ENGINES = ONNXRUNTIME, MODELOPT = ("onnxruntime", "modelopt")
# Engine -> packages beside our own whose versions decide numbers.
PACKAGES = {ONNXRUNTIME: (), MODELOPT: ("nvidia-modelopt", "torch")}


class RangeCollector(Protocol):
    """What measures activations; see ``collect.collect``."""

    def __call__(
        self,
        path: Path,
        layers: Sequence[QuantLayer],
        samples: Samples,
        *,
        threads: int = 0,
        progress: Callable[[int, int], None] = ...,
        kept_rows: int = ...,
    ) -> dict[str, TensorStatistics]:
        """Return the statistics of every layer's activation, by its name."""
        ...


def engine_named(name: str, method: str, number: NumberFormat) -> RangeCollector:
    """Return the engine called ``name``.

    Args:
        name: One of ``ENGINES``.
        method: How it chooses ranges, a key of ``CALIBRATORS``.
        number: The activations' format.

    Raises:
        BackendMissingError: It is not installed.
        UsageError: It cannot choose ranges so.
    """
    if name == ONNXRUNTIME:
        return collect
    if name != MODELOPT:
        raise BackendMissingError(
            f"calibration engine {name}: there is none of that name",
            expected=" or ".join(ENGINES),
            fix=f"Leave the engine out: {ONNXRUNTIME} is always there",
        )
    modelopt.refuse_without_calibrator(method, number)
    modelopt.load_modelopt()
    return partial(collect, begin=partial(modelopt.ModeloptStatistics, method, number))


def refuse_combination(name: str, combine: str | None) -> None:
    """Refuse to combine tasks in a way that an engine cannot.

    Raises:
        UsageError: ``weighted``, by an engine other than our own.
    """
    if name != ONNXRUNTIME and combine == WEIGHTED:
        raise UsageError(
            f"--engine {name} --combine {WEIGHTED}: tasks of different weight",
            expected="union or per-task, because its calibrators count every value once",
            fix="Leave out --engine, or --combine",
        )
