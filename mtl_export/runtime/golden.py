"""A few inputs of a model with the outputs it gave <-> ``golden.npz`` beside it.

Whoever has the folder and a runtime, and nothing else, can run the model again and see
whether it still answers as it did where it was compared. A numpy archive, read without
pickle, of

    golden                   JSON: {"schema": "mtl-export.golden/1", "vectors": [
                               {"name", "model", "atol", "rtol"}, ...]}
    <i>.inputs.<name>        inputs of vector i, in the model's dtypes
    <i>.outputs.<name>       its outputs

An output passes when every element is within ``atol + rtol * |saved|``, and where the
saved one is NaN or infinite, equal to it. Needs numpy alone; the same vectors give the
same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.checkpoint.files.json_file import Shape, parse_json
from mtl_export.checkpoint.files.npz_file import read_npz
from mtl_export.errors import IntegrityError

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

GOLDEN_FILE = "golden.npz"
SCHEMA = "mtl-export.golden/1"
_INDEX = "golden"
_SHAPE: Shape = {
    "schema": {SCHEMA},
    "vectors": [{"name": str, "model": str, "atol": float, "rtol": float}],
}
_FIX = "Run mtl-export parity --golden again where the folder was made"


@dataclass(frozen=True)
class Vector:
    """One batch and what came of it.

    Attributes:
        name: The task, or what the batch is for.
        model: File name of the model, in the same folder.
        inputs: By name.
        outputs: By name.
        atol: Absolute error allowed.
        rtol: Error allowed relative to the saved output.
    """

    name: str
    model: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    atol: float
    rtol: float

    @property
    def largest(self) -> float:
        """Return the size of the largest saved value."""
        sizes = (np.abs(saved[np.isfinite(saved)]) for saved in self.outputs.values())
        return float(max(size.max(initial=0.0) for size in sizes))

    @property
    def widest(self) -> float:
        """Return the largest error allowed at any value."""
        return self.atol + self.rtol * self.largest

    @property
    def vacuity(self) -> str:
        """Return why a pass within these tolerances would show nothing, or "".

        ``parity --golden`` allows a few noise floors, far less than what is answered.
        """
        exact = self.atol == self.rtol == 0.0
        if exact or (min(self.atol, self.rtol) >= 0.0 and self.widest < self.largest):
            return ""
        return (
            f"errors up to {self.widest:.3g} are allowed, and no answer is larger than"
            f" {self.largest:.3g}: any would pass"
        )

    def difference(self, found: Mapping[str, Array]) -> str:
        """Return how ``found`` differs beyond what is allowed, or ""."""
        for name, saved in self.outputs.items():
            if name not in found:
                return f"no output {name!r}"
            if found[name].shape != saved.shape:
                return f"{name} has shape {list(found[name].shape)}, not {list(saved.shape)}"
            wrong = self._wrong(saved, found[name])
            if wrong.any():
                first = tuple(int(i) for i in np.argwhere(wrong)[0])
                return (
                    f"{int(wrong.sum())} of {wrong.size} values of {name} differ; the first,"
                    f" {list(first)}, is {float(found[name][first]):.6g}, was"
                    f" {float(saved[first]):.6g}, may differ by {self._allowed(saved[first]):.3g}"
                )
        return ""

    def _wrong(self, saved: Array, found: Array) -> Array:
        finite = np.isfinite(saved)
        same = (saved == found) | (np.isnan(saved) & np.isnan(found))
        with np.errstate(invalid="ignore"):
            close = np.abs(found - saved) <= self.atol + self.rtol * np.abs(saved)
        wrong: Array = ~np.where(finite, close, same)
        return wrong

    def _allowed(self, saved: float) -> float:
        return self.atol + self.rtol * abs(saved) if np.isfinite(saved) else 0.0


def golden_bytes(vectors: Sequence[Vector]) -> bytes:
    """Return the content of ``golden.npz``."""
    index = {
        "schema": SCHEMA,
        "vectors": [
            {"name": one.name, "model": one.model, "atol": one.atol, "rtol": one.rtol}
            for one in vectors
        ],
    }
    arrays: dict[str, Any] = {_INDEX: np.array(json.dumps(index))}
    for number, one in enumerate(vectors):
        arrays |= {f"{number}.inputs.{name}": value for name, value in one.inputs.items()}
        arrays |= {f"{number}.outputs.{name}": value for name, value in one.outputs.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_golden(path: Path) -> tuple[Vector, ...]:
    """Return the vectors in ``path``.

    Raises:
        IntegrityError: It is not such an archive.
    """
    text, arrays = read_npz(path, _INDEX, error=IntegrityError, fix=_FIX)
    index = parse_json(text, f"{path}: {_INDEX}", _SHAPE, error=IntegrityError, fix=_FIX)
    return tuple(_vector(path, number, one, arrays) for number, one in enumerate(index["vectors"]))


def _vector(
    path: Path, number: int, facts: Mapping[str, Any], arrays: Mapping[str, Array]
) -> Vector:

    def part(kind: str) -> dict[str, Array]:
        prefix = f"{number}.{kind}."
        return {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            if name.startswith(prefix)
        }

    model, inputs, outputs = facts["model"], part("inputs"), part("outputs")
    problem = ""
    if Path(model).name != model or "\0" in model:
        problem = f"the model {model!r} lies outside the folder"
    elif not inputs or not outputs:
        problem = f"vector {number} is empty"
    elif any(value.dtype.kind == "b" for value in outputs.values()):
        problem = f"an output of vector {number} is no number"
    if problem:
        raise IntegrityError(
            f"{path}: {problem}", expected=f'vectors of schema "{SCHEMA}"', fix=_FIX
        )
    return Vector(facts["name"], model, inputs, outputs, float(facts["atol"]), float(facts["rtol"]))
