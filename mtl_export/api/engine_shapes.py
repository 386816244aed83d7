"""``--min-shapes``, ``--opt-shapes``, ``--max-shapes`` -> an optimization profile.

What is given for one input holds for every input that shares the dimension's name, so
``--max-shapes input_ids:64x128`` is enough: ``batch`` is 64 and ``sequence`` 128 in the
others too, and in the other graphs of a model that has several. A dimension that is one
more than another (``past + 1``) follows it. What nothing was given for takes the model's
default range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from mtl_export.tensorrt.shapes import Profile, Shape
    from mtl_export.tensorrt.source import TensorInfo

SMALLEST, BEST, LARGEST = 0, 1, 2
# One profile as typed: smallest, best, largest; None for what was left out.
ShapeTexts: TypeAlias = tuple[str | None, str | None, str | None]


def profiles_from_options(
    onnx_path: Path, given: Sequence[ShapeTexts], *, beside: Sequence[Path] = ()
) -> tuple[Profile, ...]:
    """Return the profiles as typed, or the model's default; none if nothing is dynamic.

    Args:
        onnx_path: The model.
        given: The profiles as typed.
        beside: The other graphs of the same model; the shapes may name their inputs too.

    Raises:
        UsageError: A shape is malformed or does not fit the model.
    """
    found = [
        profile_from_options(onnx_path, *texts, beside=beside)
        for texts in given or ((None, None, None),)
    ]
    return tuple(profile for profile in found if profile.shapes)


def profile_from_options(
    onnx_path: Path,
    smallest: str | None,
    best: str | None,
    largest: str | None,
    *,
    beside: Sequence[Path] = (),
) -> Profile:
    """Return the profile that the three options describe.

    Args:
        onnx_path: The model.
        smallest: ``--min-shapes``.
        best: ``--opt-shapes``.
        largest: ``--max-shapes``.
        beside: The other graphs of the same model; the shapes may name their inputs too.

    Raises:
        UsageError: A shape is malformed or does not fit the model.
    """
    from mtl_export.tensorrt.shapes import (
        Profile,
        check_profiles,
        default_profile,
        parse_shapes,
    )
    from mtl_export.tensorrt.source import read_source

    given = [parse_shapes(text) if text else {} for text in (smallest, best, largest)]
    default = default_profile(onnx_path, given={name for shapes in given for name in shapes})
    if not any(given):
        return default
    source = read_source(onnx_path)
    inputs = {tensor.name: tensor for tensor in source.inputs}
    others = [tensor for path in beside for tensor in read_source(path).inputs]
    sizes = [_sizes_by_dimension([*inputs.values(), *others], shapes) for shapes in given]
    # What belongs to another graph alone has given its sizes, and is no mistake here.
    own = [
        {name: shape for name, shape in shapes.items() if not _belongs(inputs, others, name, shape)}
        for shapes in given
    ]
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name in [*default.shapes, *(n for part in own for n in part if n not in default.shapes)]:
        tensor, limits = inputs.get(name), default.shapes.get(name)
        rows: list[Shape | None] = [part.get(name) for part in own]
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


def _belongs(
    inputs: dict[str, TensorInfo], others: Sequence[TensorInfo], name: str, shape: Shape
) -> bool:
    """Return whether the shape fits an input of another graph, and none of this one."""
    if name in inputs and inputs[name].admits(shape):
        return False
    return any(tensor.name == name and tensor.admits(shape) for tensor in others)


def _sizes_by_dimension(tensors: Sequence[TensorInfo], shapes: dict[str, Shape]) -> dict[str, int]:
    """Return the sizes given, and those of the dimensions that follow from them."""
    from mtl_export.tensorrt.shapes import base_and_offset

    named = {
        dimension: size
        for tensor in tensors
        if tensor.name in shapes
        for dimension, size in zip(tensor.shape, shapes[tensor.name], strict=False)
        if isinstance(dimension, str)
    }
    bases: dict[str, int] = {}
    for dimension, size in named.items():
        base, offset = base_and_offset(dimension)
        bases.setdefault(base, size - offset)
    dimensions = {one for tensor in tensors for one in tensor.shape if isinstance(one, str)}
    follow = {
        dimension: bases[base] + offset
        for dimension in dimensions - named.keys()
        for base, offset in [base_and_offset(dimension)]
        if base in bases
    }
    return named | follow


def _by_dimension(tensor: TensorInfo, default: Shape, sizes: dict[str, int]) -> Shape:
    return tuple(
        sizes.get(dimension, size) if isinstance(dimension, str) else size
        for dimension, size in zip(tensor.shape, default, strict=True)
    )


def _each(choose: Callable[[int, int], int], first: Shape, second: Shape) -> Shape:
    return tuple(choose(a, b) for a, b in zip(first, second, strict=False))
