"""One planted fault, and what is expected of a gate that sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtl_export.names import MERGED_MODEL, PER_TASK_ONNX, SINGLE_ONNX
from tests.benchmarks.gate.project import Project

FAILED, REFUSED = 3, 7
HF, ONE, ALL = MERGED_MODEL, PER_TASK_ONNX, SINGLE_ONNX


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong.
        model: Of which project: ``roberta``, ``llama``, ``t5``, ``dora``.
        artefact: What it is planted in, as reports name it; empty for all.
        plant: Plants it.
        where: Pattern that one line of what ``mtl-export parity`` prints must match: a
            ``FAILED`` line, or the error of a refusal.
        code: The exit code that is right.
        sealed: The manifests are rewritten afterwards, as an exporter that is wrong would
            write them; otherwise the file changed later.
    """

    name: str
    model: str
    artefact: str
    plant: Callable[[Project], None]
    where: str
    code: int = FAILED
    sealed: bool = True
