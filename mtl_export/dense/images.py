"""Users' images, and labels beside them: a folder of files, an ``.npz`` or a function.

image    [N, 3, H, H] float: prepared already, or
images   [N, h, w, 3] RGB from 0 to 255: resized and normalised here
<task>   labels: [N, H, H] classes or 0/1, [N, H, H, 3] unit normals, [N, H, H] depths; 255 in
         class maps, 0 0 0 in normals and 0 in depths mean "nobody knows"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mtl_export.checkpoint.tensors import Array
from mtl_export.data.samples import load_data
from mtl_export.errors import CalibrationError
from mtl_export.names import IMAGE
from mtl_export.runtime.images import encode_images

IMAGE_FILES = frozenset({".jpeg", ".jpg", ".png"})
RAW = "images"


def read_images(reference: str, size: int) -> tuple[Array, Mapping[str, Array]]:
    """Return ``[N, 3, size, size]`` float32, and what else the reference holds, by name.

    Args:
        reference: A folder of PNG or JPEG files, an ``.npz``, or ``module:function``.
        size: Side in pixels.

    Raises:
        CalibrationError: It holds no images of that size.
    """
    path = Path(reference)
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() in IMAGE_FILES)
        if not files:
            raise _refusal(reference, "no PNG or JPEG file in it", size)
        return encode_images(files, size), {}
    data = load_data(reference)
    if not isinstance(data, dict):
        raise _refusal(reference, "rows of texts", size)
    labels = {name: value for name, value in data.items() if name not in {IMAGE, RAW}}
    if RAW in data:
        return encode_images(data[RAW], size), labels
    images = data.get(IMAGE)
    if images is None:
        raise _refusal(reference, f"neither {IMAGE} nor {RAW}", size)
    if images.ndim != 4 or images.shape[1:] != (3, size, size) or not len(images):
        raise _refusal(reference, f"{IMAGE} is {list(images.shape)}", size)
    if not np.isfinite(images).all():
        raise _refusal(reference, f"{IMAGE} has NaN or Inf", size)
    return images.astype(np.float32), labels


def _refusal(reference: str, found: str, size: int) -> CalibrationError:
    return CalibrationError(
        f"{reference}: {found}",
        expected=f"{IMAGE} [N, 3, {size}, {size}], {RAW} [N, h, w, 3], or a folder of PNG or JPEG",
        fix=f"Save it with numpy.savez(path, {RAW}=pixels)",
    )
