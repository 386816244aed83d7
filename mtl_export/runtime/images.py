"""Images -> the input of a model of dense tasks, as its trainer prepares them.

Resized by bicubic interpolation without antialiasing (OpenCV's ``INTER_CUBIC``, a = -0.75, edges
repeated), cut to whole bytes, divided by 255, brought to ImageNet's mean and deviation.

Source: data/custom_transforms.py and data/mtl_ds.py of
https://github.com/scale-lab/MTLoRA/tree/333a375; OpenCV's documentation of ``resize``. Needs numpy
alone; paths need Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_export.checkpoint.files.json_file import Shape, parse_json
from mtl_export.errors import BackendMissingError, EngineRunError, UsageError
from mtl_export.names import DENSE_KEY, IMAGE
from mtl_export.runtime.arguments import count_of
from mtl_export.runtime.ort import run_session

if TYPE_CHECKING:
    from mtl_export.checkpoint.tensors import Array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_A = -0.75


def image_size_of(metadata: Mapping[str, str]) -> int:
    """Return the side of the images that a graph takes, from its metadata; 0 if it takes none.

    Raises:
        EngineRunError: The metadata holds something else.
    """
    if DENSE_KEY not in metadata:
        return 0
    shape: Shape = {"image_size": int, "postprocessed": bool, "mode": str, "kinds": {str: str}}
    fix = "Export the graph again"
    size: int = parse_json(metadata[DENSE_KEY], DENSE_KEY, shape, error=EngineRunError, fix=fix)[
        "image_size"
    ]
    return size


class ImageGraph:
    """What a session does where images go in and every task answers each of them.

    Args:
        session: What ``open_session`` returned.
        path: Its file, for messages.
        size: Side of the images; 0 where the graph takes none, and every call is refused.
    """

    def __init__(self, session: Any, path: Path, size: int) -> None:
        self._session, self._path, self.size = session, path, size

    def encode(self, images: Sequence[Any] | Array) -> Array:
        """Return the graph's input; see ``encode_images``."""
        self._refuse_none()
        return encode_images(images, self.size)

    def run(self, images: object, max_batch: int | None) -> dict[str, Array]:
        """Return every task's map of every image.

        Raises:
            UsageError: They are no such images.
            EngineRunError: The graph failed, or a map has NaN, which is no answer.
        """
        self._refuse_none()
        shape = (3, self.size, self.size)
        if not isinstance(images, np.ndarray) or images.shape[1:] != shape or not len(images):
            found = list(images.shape) if isinstance(images, np.ndarray) else type(images).__name__
            raise UsageError(
                f"images: {found}",
                expected=f"an array [B, {', '.join(map(str, shape))}], B at least 1",
                fix="Pass what encode_images returns",
            )
        step = len(images) if max_batch is None else count_of("max_batch", max_batch)
        parts = [
            run_session(self._session, self._path, {IMAGE: images[start : start + step]})
            for start in range(0, len(images), step)
        ]
        maps = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, values in maps.items():
            if values.dtype.kind == "f" and np.isnan(values).any():
                raise EngineRunError(
                    f"{self._path}: {name} has NaN",
                    expected="numbers, because NaN is no answer",
                    fix="Look at the images: one may hold NaN or Inf",
                )
        return maps

    def _refuse_none(self) -> None:
        if not self.size:
            raise UsageError(
                f"{self._path}: it takes no images",
                expected="a graph of dense tasks, whose input is image",
                fix="Pass inputs by name, such as encode returns",
            )


def encode_images(images: Sequence[Any] | Array, size: int) -> Array:
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
