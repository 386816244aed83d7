"""``--min-shapes``, ``--opt-shapes``, ``--max-shapes`` -> an optimization profile.

What is given for one input holds for every input that shares the dimension's name, so
``--max-shapes input_ids:64x128`` is enough: ``batch`` is 64 and ``sequence`` 128 in the
others too. What nothing was given for takes the model's default range.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtl_export.runtime.tensorrt.shapes import Profile, Shape
    from mtl_export.runtime.tensorrt.source import TensorInfo

SMALLEST, BEST, LARGEST = 0, 1, 2


def profile_from_options(
    onnx_path: Path, smallest: str | None, best: str | None, largest: str | None
) -> Profile:
    """Return the profile that the three options describe.

    Args:
        onnx_path: The model.
        smallest: ``--min-shapes``.
        best: ``--opt-shapes``.
        largest: ``--max-shapes``.

    Raises:
        UsageError: A shape is malformed or does not fit the model.
    """
    from mtl_export.runtime.tensorrt.shapes import (
        Profile,
        check_profiles,
        default_profile,
        parse_shapes,
    )
    from mtl_export.runtime.tensorrt.source import read_source

    default = default_profile(onnx_path)
    given = [parse_shapes(text) if text else {} for text in (smallest, best, largest)]
    if not any(given):
        return default
    source = read_source(onnx_path)
    inputs = {tensor.name: tensor for tensor in source.inputs}
    sizes = [_sizes_by_dimension(inputs, shapes) for shapes in given]
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name in [*default.shapes, *(n for part in given for n in part if n not in default.shapes)]:
        tensor, limits = inputs.get(name), default.shapes.get(name)
        rows: list[Shape | None] = [part.get(name) for part in given]
        if tensor is not None and limits is not None:
            rows = [
                row or _by_dimension(tensor, limits[index], sizes[index])
                for index, row in enumerate(rows)
            ]
        known = next(row for row in rows if row is not None)
        low, middle, high = (row or known for row in rows)
        low = low if given[SMALLEST] else _each(min, low, high)
        middle = middle if given[BEST] else _each(min, _each(max, middle, low), high)
        high = high if given[LARGEST] else _each(max, high, middle)
        shapes[name] = (low, middle, high)
    profile = Profile(shapes)
    check_profiles(source, [profile])
    return profile


def _sizes_by_dimension(inputs: dict[str, TensorInfo], shapes: dict[str, Shape]) -> dict[str, int]:
    return {
        dimension: size
        for name, shape in shapes.items()
        if name in inputs
        for dimension, size in zip(inputs[name].shape, shape, strict=False)
        if isinstance(dimension, str)
    }


def _by_dimension(tensor: TensorInfo, default: Shape, sizes: dict[str, int]) -> Shape:
    return tuple(
        sizes.get(dimension, size) if isinstance(dimension, str) else size
        for dimension, size in zip(tensor.shape, default, strict=True)
    )


def _each(choose: Callable[[int, int], int], first: Shape, second: Shape) -> Shape:
    return tuple(choose(a, b) for a, b in zip(first, second, strict=False))
