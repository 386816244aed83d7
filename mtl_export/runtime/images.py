"""Images -> the input of a model of dense tasks, as its trainer prepares them.

Resized by bicubic interpolation without antialiasing (OpenCV's ``INTER_CUBIC``, a = -0.75, edges
repeated), cut to whole bytes, divided by 255, brought to ImageNet's mean and deviation.

Source: data/custom_transforms.py and data/mtl_ds.py of
https://github.com/scale-lab/MTLoRA/tree/333a375; OpenCV's documentation of ``resize``. Needs numpy
alone; paths need Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.errors import BackendMissingError, UsageError

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_A = -0.75


def encode_images(images: Sequence[Any], size: int) -> Array:
    """Return float32 ``[B, 3, size, size]``.

    Args:
        images: Arrays ``[h, w, 3]``, RGB from 0 to 255, of any sizes; or paths of files.
        size: Side of the model's images in pixels.

    Raises:
        UsageError: An image is none, or cannot be read.
        BackendMissingError: A path was given and Pillow is not installed.
    """
    if not isinstance(images, list | tuple | np.ndarray) or len(images) == 0:
        raise UsageError(
            f"images: {type(images).__name__}",
            expected="a list of arrays [h, w, 3] or of paths, at least one",
            fix="Pass [image], even for a single one",
        )
    return np.stack([_encoded(image, place, size) for place, image in enumerate(images)])


def _encoded(image: Any, place: int, size: int) -> Array:
    pixels = _read(image) if isinstance(image, str | Path) else np.asarray(image)
    is_number = pixels.dtype.kind in "uif"
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or not is_number:
        raise UsageError(
            f"image {place}: {pixels.dtype} {list(pixels.shape)}",
            expected="[height, width, 3], RGB from 0 to 255",
            fix="Convert it to RGB, channels last",
        )
    resized = _resized(_resized(pixels.astype(np.float32), size, 0), size, 1)
    # The trainer's cast: what interpolation carries below 0 or above 255 wraps around.
    whole = np.trunc(resized).astype(np.int64).astype(np.uint8)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    values = (whole.astype(np.float32) / np.float32(255) - mean) / std
    encoded: Array = np.ascontiguousarray(values.transpose(2, 0, 1))
    return encoded


def _resized(values: Array, size: int, axis: int) -> Array:
    """Return the values interpolated to ``size`` along an axis."""
    count = values.shape[axis]
    if count == size:
        return values
    at = (np.arange(size) + 0.5) * (count / size) - 0.5
    first = np.floor(at).astype(np.int64)
    t = (at - first).astype(np.float32)
    outer = ((_A * (t + 1) - 5 * _A) * (t + 1) + 8 * _A) * (t + 1) - 4 * _A
    inner = ((_A + 2) * t - (_A + 3)) * t * t + 1
    u = 1 - t
    inner_after = ((_A + 2) * u - (_A + 3)) * u * u + 1
    weights = (outer, inner, inner_after, 1 - outer - inner - inner_after)
    shape = [1] * values.ndim
    shape[axis] = size
    total: Array = np.zeros((), np.float32)
    for offset, weight in enumerate(weights):
        rows = np.clip(first + offset - 1, 0, count - 1)
        total = total + np.take(values, rows, axis) * weight.reshape(shape)
    return total


def _read(path: str | Path) -> Array:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise BackendMissingError(
            f"{path}: Pillow is not installed",
            expected="it to read image files; arrays need nothing",
            fix="pip install pillow",
        ) from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UsageError(
            f"{path}: no image that Pillow reads ({error})",
            expected="a PNG, JPEG or the like",
            fix="Correct the path",
        ) from error
